"""What a GPU makes of the codecs: its tests, then bf16 GB/s in beside the copy to the device and the CPU of the machine.

make gpu                                              # on a machine with one; some minutes
python benchmarks/gpu.py --table gpu.md               # the same, in an environment that has everything
python benchmarks/gpu.py --device cpu --tiny          # the columns of the CPU, in seconds: tries this script

A model is written first (one file of experts of the 300B, 3 GB of Gaussian bf16) to a folder that is removed at the end. Then,
for each recipe, with a thread per processor (at most 8):

on the device     weights lie there: search, decoding, sums for the report, packing
from memory       the same, from this machine's memory and back to it; `CPU` is the same on the processors
file in memory    the whole command: a file that the system has in its cache, a result in DIR (--memory), hashed as always
file from disk    the whole command: the cache has forgotten the file, the result goes to the disk

Whatever fails is printed in its cell, and the rest goes on; after --seconds no new cell is begun. Ends with code 1 if a test
or a cell failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_geometry
import torch

from ernie_quant import devices, library, runtimes
from ernie_quant.errors import ErnieQuantError
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Step
from ernie_quant.run.memory import return_freed_memory
from ernie_quant.run.shard import encode_slab
from ernie_quant.runtimes import Runtime
from ernie_quant.sources import open_source
from ernie_quant.threads import default_workers, one_torch_thread, ordered
from ernie_quant.views.files import Files
from ernie_quant.views.read import read

TESTS_SECONDS = 200
COPIES = 20
# name in the table, recipe, its options in the library
RECIPES: list[tuple[str, str, dict[str, Any]]] = [
    ("wint4", "wint4", {"experts_only": True}),
    ("wint8", "wint8", {"experts_only": True}),
    ("fp8", "fp8", {"experts_only": True}),
    ("wint2, effort 1", "wint2", {"effort": 1, "wint4_layers": 0}),
    ("wint2, effort 16", "wint2", {"effort": 16, "wint4_layers": 0}),
]
Slabs = list[tuple[Step, torch.Tensor]]


def write_model(folder: Path, *, tiny: bool) -> Path:
    """One layer of experts of the 300B, in one file; the attention of a small model and next to no vocabulary."""
    sizes = {"hidden": 256, "widths": (128,), "experts": (4,)} if tiny else {"experts": (16,)}
    geometry = replace(make_geometry.GEOMETRIES["300b"], heads=8, kv_heads=4, first_moe=0, mtp=0, **sizes)
    make_geometry.GEOMETRIES["gpu"], make_geometry.VOCABULARY = geometry, 256
    arguments = {"model": "gpu", "out": folder, "layers": 1, "experts": None, "first_moe": None, "format": "pt", "fill": True}
    print(make_geometry.write_checkpoint(argparse.Namespace(**arguments, shard_gb=100, seed=0, bf16_tag="U16")), flush=True)
    return folder / "model.safetensors"


def slabs_of(source: Path, recipe: str, options: dict[str, Any]) -> tuple[Slabs, Runtime]:
    """The slabs of the experts in memory, as a run has them."""
    made = built_in.make(recipe, "", **options)
    plan = make_plan(open_source(source), runtime=made.runtime, recipe=made.recipe)
    found: Slabs = []
    with Files() as files:
        for step in plan.steps:
            if step.quantized and ".experts." in step.name:
                found += [(step, read(step.view, files, rows)) for rows in step.slabs()]
    return found, runtimes.find(made.runtime)


def nbytes(slabs: Slabs) -> int:
    """Of bf16 that goes in."""
    return sum(weight.nbytes for _, weight in slabs)


def through(slabs: Slabs, runtime: Runtime, device: str) -> float:
    """Seconds for all slabs, from where they lie to where they are written from; what lies on a device stays there."""
    crew = devices.Crew(device)

    def work(item: tuple[Step, torch.Tensor]) -> None:
        step, weight = item
        with crew.at_work() as own:
            if weight.device.type != "cpu":
                encode_slab(step, runtime, weight)
                torch.cuda.current_stream().synchronize()
                return
            if own != devices.CPU:
                weight = devices.sent(devices.buffer(tuple(weight.shape), weight.dtype, own).copy_(weight), own)
            devices.fetched(encode_slab(step, runtime, weight).parts, own)

    with one_torch_thread():
        work(slabs[0])  # compiles
        start = time.perf_counter()
        for _ in ordered(work, slabs, crew.workers(default_workers())):
            pass
        return time.perf_counter() - start


def run(source: Path, out: Path, recipe: str, options: dict[str, Any], device: str) -> float:
    """Seconds of the command, without its imports and the sync at its end."""
    start = time.perf_counter()
    try:
        library.quantize(source, out, recipe, device=device, **options)
        return time.perf_counter() - start
    finally:
        shutil.rmtree(out, ignore_errors=True)


def forget(file: Path) -> None:
    """Drop a file from the system's cache."""
    os.sync()
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(file: Path) -> None:
    """Read a file into the system's cache."""
    with file.open("rb", buffering=0) as opened:
        while opened.read(1 << 24):
            pass


def copy_speed(device: str) -> str:
    """GB/s from pinned memory to the device, and back."""
    here = devices.buffer((32 << 20,), torch.uint8, device)
    there = here.to(device)
    found = []
    for target, source in ((there, here), (here, there)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        found.append(f"{COPIES * here.nbytes / (time.perf_counter() - start) / 1e9:.1f}")
    return f"copy to the device {found[0]} GB/s, back {found[1]} GB/s"


class Table:
    """Cells in GB/s, each tried by itself and not after the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.failed = deadline, False

    def cell(self, what: str, size: int, seconds: Callable[[], float]) -> str:
        """GB/s of `size` bytes, or what went wrong."""
        if time.monotonic() > self.deadline:
            return "no time left"
        try:
            speed = f"{size / seconds() / 1e9:.2f}"
        except Exception as error:  # of any kind: the other cells are worth having
            self.failed = True
            speed = f"failed: {type(error).__name__}"
            print(f"{what}: {type(error).__name__}: {error}", flush=True)
        print(f"{what}: {speed}", flush=True)
        return speed


def row(table: Table, name: str, slabs: Slabs, runtime: Runtime, file: Path, places: tuple[Path, Path], device: str) -> list[str]:
    """One recipe."""
    recipe, options = next((recipe, options) for known, recipe, options in RECIPES if known == name)
    size, whole = nbytes(slabs), file.stat().st_size
    cells = [name]
    if device != devices.CPU:
        first = devices.found(device)[0]

        def on_device() -> float:
            return through([(step, weight.to(first)) for step, weight in slabs], runtime, first)

        cells.append(table.cell(f"{name}, on the device", size, on_device))
        cells.append(table.cell(f"{name}, from memory", size, lambda: through(slabs, runtime, device)))
    cells.append(table.cell(f"{name}, from memory, CPU", size, lambda: through(slabs, runtime, devices.CPU)))
    remember(file)
    memory, disk = places
    cells.append(table.cell(f"{name}, file in memory", whole, lambda: run(file.parent, memory / "out", recipe, options, device)))
    forget(file)
    cells.append(table.cell(f"{name}, file from disk", whole, lambda: run(file.parent, disk / "out", recipe, options, device)))
    return cells


def tests() -> bool:
    """Do those that are marked `gpu` pass?"""
    root = Path(__file__).parents[1]
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "--tb=short", "--no-header"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    try:
        return subprocess.run(line, cwd=root, env=env, timeout=TESTS_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"tests: not done after {TESTS_SECONDS} seconds", flush=True)
        return False


def about(device: str) -> str:
    """The machine, in a line."""
    threads = f"{default_workers()} threads of {os.cpu_count()} processors, PyTorch {torch.__version__}"
    if device == devices.CPU:
        return threads
    import triton

    found = devices.found(device)
    names = f"{len(found)} x {torch.cuda.get_device_name(found[0])}" if len(found) > 1 else torch.cuda.get_device_name(found[0])
    return f"{names}, CUDA {torch.version.cuda}, Triton {triton.__version__}, {threads}; {copy_speed(found[0])}"


def main() -> int:
    """0 if everything passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="as of the commands")
    parser.add_argument("--table", type=Path, help="write the table to this file, too")
    parser.add_argument("--tiny", action="store_true", help="a model of some MB")
    parser.add_argument("--seconds", type=float, default=400, help="after which no new cell is begun")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk, for the model and results")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "build"))
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    arguments = parser.parse_args()
    table = Table(time.monotonic() + arguments.seconds)
    try:
        machine = about(arguments.device)
    except ErnieQuantError as error:
        parser.error(str(error))
    print(machine, flush=True)
    untested = arguments.no_tests or arguments.device == devices.CPU
    passed = untested or tests()
    said = "not run" if untested else "passed" if passed else "FAILED"
    return_freed_memory()
    on_gpu = [] if arguments.device == devices.CPU else ["on the device", "from memory"]
    lines = [["bf16 GB/s in", *on_gpu, "from memory, CPU", "file in memory", "file from disk"]]
    lines.append(["---"] * len(lines[0]))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as disk,
        tempfile.TemporaryDirectory(dir=arguments.memory) as memory,
    ):
        file = write_model(Path(disk) / "model", tiny=arguments.tiny)
        for name, recipe, options in RECIPES:
            if arguments.only in name:
                try:
                    slabs, runtime = slabs_of(file.parent, recipe, options)
                    cells = row(table, name, slabs, runtime, file, (Path(memory), Path(disk)), arguments.device)
                except Exception:
                    table.failed, cells = True, [name, "failed"]
                    traceback.print_exc()
                lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    text = f"{machine}; tests {said}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    print(text, flush=True)
    if arguments.table:
        arguments.table.write_text(text)
    return 0 if passed and not table.failed else 1


if __name__ == "__main__":
    sys.exit(main())
