"""Compare the speed and memory of all that writes weights with those of copying, and with llm-compressor's, on the same files.

python benchmarks/make_geometry.py 21b SRC --layers 3 --fill --format pt --shard-gb 1
python benchmarks/throughput.py SRC [--llm-compressor PYTHON] [--only TEXT]

SRC is a PT checkpoint in bf16 with routed experts, which alone are quantized. PYTHON is an interpreter that has
llmcompressor installed; it needs its own environment. Outputs are written beside SRC and removed.

Every leg is a process of its own, timed from its start to the end of a `sync`, imports included; what these take is a row
too. The source is read once before each, so that all read from the page cache. Peak anonymous memory is that of the whole
process tree, sampled every 20 ms. Of 4 and 8 bits the error is measured here, for all tools alike, on a sample of experts
read back from disk: ||W - W'||^2 / ||W||^2, mean over tensors; ernie-quant's own report has to agree. That of WINT2 is the
report's.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

SAMPLE_SECONDS = 0.02
SAMPLED_EXPERTS = 24
EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
# llm-compressor's name of the same codec
SCHEMES = {"wint4": "W4A16", "wint8": "W8A16", "fp8": "FP8_BLOCK"}
LLM_COMPRESSOR = r"""
import sys
from llmcompressor import model_free_ptq
source, out, scheme, workers = sys.argv[1:]
ignore = [r"re:(?!.*\.mlp\.experts\.\d+\.)"]
model_free_ptq(source, out, scheme=scheme, ignore=ignore, max_workers=int(workers), device="cpu")
"""


@dataclass(frozen=True)
class Row:
    """What one leg took; `rel_error` is None where nothing is quantized."""

    name: str
    run_seconds: float
    sync_seconds: float
    peak_anon_bytes: int
    out_bytes: int
    rel_error: float | None

    @property
    def seconds(self) -> float:
        """Time until the output is safe."""
        return self.run_seconds + self.sync_seconds


MEASURED, REPORTED = "measured", "reported"


@dataclass(frozen=True)
class Leg:
    """A command; where the error of what it writes comes from, if it has one; does it read what the one before wrote?"""

    name: str
    command: list[str]
    error: str = ""
    reads: bool = False


def process_tree(pid: int) -> list[int]:
    """Return the process and all its descendants that are alive."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                pids += map(int, children.read_text().split())
    return pids


def anon_bytes(pid: int) -> int:
    """Return the resident anonymous memory of one process, 0 when it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a command, then `sync`; return the seconds of each and the command's peak of anonymous bytes."""
    with tempfile.TemporaryFile("w+") as log:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(map(anon_bytes, process_tree(process.pid))))
            time.sleep(SAMPLE_SECONDS)
        ended = time.perf_counter()
        os.sync()
        synced = time.perf_counter()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\nfailed with exit code {process.returncode}\n{log.read()}")
    return ended - start, synced - ended, peak


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all weight files."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def read_once(folder: Path) -> None:
    """Fill the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def weight_map(folder: Path) -> dict[str, str]:
    """Return the file of every tensor, from the index or, where all is in one file, from that file."""
    single = folder / "model.safetensors"
    if single.exists():
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def read(folder: Path, name: str) -> Tensor:
    """Read one tensor."""
    with safe_open(folder / weight_map(folder)[name], "pt") as file:
        return file.get_tensor(name)


def sampled_experts(folder: Path) -> list[str]:
    """Return the names of expert weights spread evenly over the checkpoint."""
    names = [name for name in weight_map(folder) if EXPERT.fullmatch(name)]
    if not names:
        raise SystemExit(f"{folder}: no routed experts under their PT names")
    step = max(1, len(names) // SAMPLED_EXPERTS)
    # gate, up and down alternate: a multiple of 3 would meet only one of them
    return names[:: step + (step % 3 == 0)]


def dequantize(folder: Path, name: str) -> Tensor:
    """Decode one expert weight, [out, in] float32, whatever of the known forms it has; to bf16, as programs do."""
    stored = weight_map(folder)
    if f"{name}_packed" in stored:
        shape = read(folder, f"{name}_shape").tolist()
        packed, scale = read(folder, f"{name}_packed"), read(folder, f"{name}_scale").float()
        codes = unpack(packed, shape[1])
        return (codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)).bfloat16().float()
    codes = read(folder, name).float()
    scale = read(folder, f"{name}_scale" + ("_inv" if f"{name}_scale_inv" in stored else "")).float()
    for dim in (0, 1):
        block = math.ceil(codes.shape[dim] / scale.shape[dim])
        scale = scale.repeat_interleave(block, dim).narrow(dim, 0, codes.shape[dim])
    return (codes * scale).bfloat16().float()


def unpack(packed: Tensor, inputs: int) -> Tensor:
    """Unpack int32 words [out, words] into signed codes [out, inputs]; element i lies at bit i * bits."""
    bits = packed.shape[1] * 32 // inputs
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (packed[:, :, None] >> shifts) & (2**bits - 1)
    return fields.flatten(1)[:, :inputs].float() - 2 ** (bits - 1)


def rel_error(source: Path, out: Path, name: str) -> float:
    """Return ||W - W'||^2 / ||W||^2 of one tensor."""
    weight = read(source, name).float()
    return ((weight - dequantize(out, name)).square().sum() / weight.square().sum()).item()


def check_report(out: Path, errors: dict[str, float]) -> None:
    """Fail if report.json disagrees with the errors measured here by more than a thousandth."""
    rows = {row["name"]: row["rel_error"] for row in json.loads((out / "report.json").read_text())["tensors"]}
    for name, error in errors.items():
        if abs(rows[name] - error) > 1e-3 * error:
            raise SystemExit(f"{name}: report.json says {rows[name]:.4e}, the files say {error:.4e}")


def measure(leg: Leg, source: Path, out: Path) -> Row:
    """Run one leg and measure what it wrote."""
    read_once(source)
    os.sync()
    took = run(leg.command)
    if leg.error == MEASURED:
        errors = {tensor: rel_error(source, out, tensor) for tensor in sampled_experts(source)}
        if leg.name.startswith("ernie-quant"):
            check_report(out, errors)
    elif leg.error == REPORTED:
        rows = json.loads((out / "report.json").read_text())["tensors"]
        errors = {row["name"]: row["rel_error"] for row in rows if EXPERT.fullmatch(row["name"])}
    else:
        errors = {}
    return Row(leg.name, *took, folder_bytes(out), sum(errors.values()) / len(errors) if errors else None)


def legs(args: argparse.Namespace, out: Path) -> list[Leg]:
    """Return what is run, one after the other; legs that read a result come after the one that wrote it."""
    source, program = str(args.source), [sys.executable, "-m", "ernie_quant"]

    def ours(name: str, *options: str, error: str = MEASURED) -> Leg:
        command, *rest = options
        return Leg(f"ernie-quant {name}", [*program, command, source, str(out), *rest, "--json"], error)

    found = [
        Leg("importing torch and numba", [sys.executable, "-c", "import torch, numba"]),
        Leg("cp -r", ["cp", "-r", source, str(out)]),
        ours("convert", "convert", "--to", "paddle", error=""),
        ours("wint4, absmax", "wint4", "--experts-only", "--scale", "absmax"),
        ours("wint4", "wint4", "--experts-only"),
        Leg("reading that", ["sh", "-c", f"cat {out}/*.safetensors > /dev/null"], reads=True),
        Leg("ernie-quant verify", [*program, "verify", str(out)], reads=True),
        ours("wint8", "wint8", "--experts-only"),
        ours("fp8", "fp8", "--experts-only"),
        ours("wint2 --effort 1", "wint2", "--wint4-layers", "0", "--effort", "1", error=REPORTED),
        ours("wint2", "wint2", "--wint4-layers", "0", error=REPORTED),
    ]
    if args.llm_compressor:
        workers = "1 worker" if args.workers == 1 else f"{args.workers} workers"
        for name, scheme in SCHEMES.items():
            command = [args.llm_compressor, "-c", LLM_COMPRESSOR, source, str(out), scheme, str(args.workers)]
            found.append(Leg(f"llm-compressor {scheme} (for {name}), {workers}", command, MEASURED))
    chosen = [leg for leg in found if not args.only or args.only in leg.name or leg.name == "cp -r"]
    if len(chosen) == 1:
        raise SystemExit(f"--only {args.only} chooses none of: {', '.join(leg.name for leg in found)}")
    return chosen


def table(rows: list[Row], source_bytes: int) -> str:
    """Return a markdown table."""
    titles = ["", "seconds", "of these sync", "GB/s of bf16 in", "times cp", "peak anonymous GB", "output GB", "error"]
    copy = next((row.seconds for row in rows if row.name == "cp -r"), None)
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        lines.append(
            [
                row.name,
                f"{row.seconds:.1f}",
                f"{row.sync_seconds:.1f}",
                f"{source_bytes / row.seconds / 1e9:.2f}",
                f"{row.seconds / copy:.1f}" if copy else "",
                f"{row.peak_anon_bytes / 1e9:.2f}",
                f"{row.out_bytes / 1e9:.2f}",
                f"{row.rel_error:.2e}" if row.rel_error is not None else "",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="interpreter that has llmcompressor installed")
    parser.add_argument("--workers", type=int, default=1, help="llm-compressor's max_workers")
    parser.add_argument("--only", metavar="TEXT", help="only legs whose name contains this")
    return parser.parse_args()


def main() -> None:
    """Run the legs one after the other and print the table."""
    args = parse_args()
    args.source = args.source.resolve()
    rows = []
    # beside the source, so that reading and writing meet the same disk for all
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=args.source.parent) as work:
        out = Path(work) / "out"
        for leg in legs(args, out):
            if out.exists() and not leg.reads:
                shutil.rmtree(out)
            rows.append(measure(leg, args.source, out))
            print(f"{rows[-1].name}: {rows[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    print(table(rows, folder_bytes(args.source)))


if __name__ == "__main__":
    main()
