"""Runs: the same bytes whatever happens on the way, and nothing lost when something stops them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.models import GOLDEN, copy, random_model, same, tensors, write
from safetensors.torch import save_file

from ernie_quant import names, threads
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import OutputError, RetryError
from ernie_quant.plan import built_in, recipe
from ernie_quant.plan.make import make_plan
from ernie_quant.plan.steps import Plan
from ernie_quant.result.folder import BYTES_PER_TENSOR
from ernie_quant.run import whole
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts
from ernie_quant.writers.safetensors import lay_out

SOURCE = GOLDEN / "moe/paddle"
SMALL = 60_000  # bytes per file: eight files of the converted golden MoE
Command = Callable[..., tuple[int, str, str]]


def everything(codec: Codec) -> recipe.Recipe:
    return built_in.one_codec("test", codec, experts_only=False, mtp=True, keep_unfit=False)


INT4 = everything(RoundToNearest(4, 32))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def planned(source: Path = SOURCE, rules: recipe.Recipe = INT4, runtime: str = "vllm", shard_bytes: int = SMALL) -> Plan:
    return make_plan(open_source(source), runtime=runtime, recipe=rules, shard_bytes=shard_bytes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, state included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files were written when: a file that is written again gets another inode."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}


# H 128, Q 256, KV 128, I 128, M 128, shared experts 256: one dense layer, one with two experts
OF_128S = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "moe_num_experts": 2,
    "num_hidden_layers": 2, "moe_layer_end_index": 1, "vocab_size": 100,
}  # fmt: skip


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_one_and_four_workers_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 3000)  # many slabs, so that workers can overtake each other
    run_plan(planned(), tmp_path / "1/out", workers=1)
    run_plan(planned(), tmp_path / "4/out", workers=4)
    found = contents(tmp_path / "1/out")
    assert found == contents(tmp_path / "4/out")
    assert {"report.json", "config.json", "README.md", "ernie-quant.json", "model.safetensors.index.json"} < found.keys()


def test_threads_work_ahead_by_one_result_each() -> None:
    """Memory is bounded by it: the fifth slab is not begun before somebody takes the first."""
    begun: list[int] = []
    results = threads.ordered(lambda i: begun.append(i) or i, range(100), workers=3)
    assert next(results) == 0
    assert len(begun) <= 4
    assert list(results) == list(range(1, 100))


def test_an_interrupt_does_not_wait_for_what_is_on_its_way() -> None:
    """Workers wait for a download that may take minutes; `stop` wakes them."""
    wanted_no_more, woken = threading.Event(), []
    results = threads.ordered(lambda _: woken.append(wanted_no_more.wait(20)), range(10), 2, wanted_no_more.set)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            next(results)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert woken
    assert all(woken)


def test_two_runs_make_identical_folders(tmp_path: Path) -> None:
    run_plan(planned(), tmp_path / "a/out")
    run_plan(planned(), tmp_path / "b/out")
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


@pytest.mark.parametrize("layout", [layouts.PADDLE, layouts.PT])
@pytest.mark.parametrize(
    "codec",
    [None, RoundToNearest(4, 128), RoundToNearest(4, CHANNEL), RoundToNearest(8, 64, "absmax"), Float8Block()],
    ids=lambda codec: codec.describe() if codec else "kept",
)
def test_slabs_leave_no_trace(codec: Codec | None, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows (or one row of blocks) at a time, from transposed and split sources too."""
    source = random_model(tmp_path / "src", layout, **OF_128S)
    rules = everything(codec) if codec else recipe.KEEP_ALL
    run_plan(planned(source, rules, shard_bytes=10**9), tmp_path / "whole/out")
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 1000)
    plan = planned(source, rules, shard_bytes=10**9)
    embeddings = next(step for step in plan.steps if step.role == names.EMBED)
    assert embeddings.slabs()[-2:] == [(96, 99), (99, 100)]
    run_plan(plan, tmp_path / "rows/out")
    assert same(tensors(tmp_path / "rows/out"), tensors(tmp_path / "whole/out")) == []
    assert (tmp_path / "rows/out/model.safetensors").read_bytes() == (tmp_path / "whole/out/model.safetensors").read_bytes()


def test_joined_sources_are_read_in_slabs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PT to Paddle: q, k and v are joined and transposed."""
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 1)
    write(GOLDEN / "moe_mtp/pt", tmp_path / "paddle", "fastdeploy")
    assert same(tensors(tmp_path / "paddle"), tensors(GOLDEN / "moe_mtp/paddle")) == []


# --- the plan knows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [recipe.KEEP_ALL, INT4], ids=["kept", "int4"])
def test_planned_bytes_are_the_bytes_on_disk(rules: recipe.Recipe, tmp_path: Path) -> None:
    source = copy(SOURCE, tmp_path / "src")
    (source / "tokenizer.model").write_bytes(b"\0" * 1234)
    (source / "README.md").write_text("the source's own")
    plan = planned(source, rules)
    run_plan(plan, tmp_path / "out")
    stored = sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert plan.nbytes == stored
    copied = [tmp_path / "out" / n for n in ("tokenizer.model", "README.source.md", "generation_config.json")]
    weights = list((tmp_path / "out").glob("*.safetensors"))
    assert plan.disk_bytes == sum(p.stat().st_size for p in [*weights, *copied])
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == stored


def test_every_header_is_known_before_the_run(tmp_path: Path) -> None:
    plan = planned()
    heads = {s.filename: lay_out(s.specs, plan.metadata).head for s in plan.shards}
    run_plan(plan, tmp_path / "out")
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")}
    assert {name: data[: len(heads[name])] for name, data in files.items()} == heads
    assert [s.filename for s in plan.shards] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]


@pytest.mark.parametrize("limit", [5_000, 40_000, 10**9])
def test_no_file_holds_more_than_the_limit_but_one_that_holds_a_single_weight(limit: int) -> None:
    plan = planned(shard_bytes=limit)
    sizes = [sum(spec.nbytes for spec in s.specs.values()) for s in plan.shards]
    assert sum(sizes) == plan.nbytes
    assert all(size <= limit or len(s.steps) == 1 for size, s in zip(sizes, plan.shards, strict=True))
    # and no two neighbours would have fitted into one
    first = [s.steps[0].nbytes for s in plan.shards[1:]]
    assert all(size + step > limit for size, step in zip(sizes, first, strict=False))


# --- interrupted -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def stop_in_second_shard(plan: Plan) -> Callable[[int], None]:
    """A progress callback that raises when the second file is half written."""
    left = sum(step.spec.nbytes for step in plan.shards[0].steps)

    def progress(done: int) -> None:
        nonlocal left
        if left <= 0:
            raise Killed
        left -= done

    return progress


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    plan, out = planned(), tmp_path / "killed/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    first = plan.shards[0].filename
    assert {p.name for p in out.iterdir()} == {first, ".ernie-quant"}  # nothing half-written under a final name
    before = stamps(out)
    result = run_plan(plan, out)
    assert stamps(out)[first] == before[first]
    assert len(result.reports) == len(plan.steps)
    run_plan(plan, tmp_path / "straight/out")
    assert contents(out) == contents(tmp_path / "straight/out")


def test_finished_files_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, written = planned(), []
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    original = whole.run_shard
    monkeypatch.setattr(whole, "run_shard", lambda job, **how: written.append(job.shard) or original(job, **how))
    done: list[int] = []
    run_plan(plan, tmp_path / "out", progress=done.append)
    assert [s.filename for s in written] == [s.filename for s in plan.shards[1:]]
    assert sum(done) == sum(step.spec.nbytes for step in plan.steps)  # the bar reaches its end


def test_a_finished_file_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    plan, out = planned(), tmp_path / "killed/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    os.truncate(out / plan.shards[0].filename, 100)
    run_plan(plan, out)
    run_plan(plan, tmp_path / "straight/out")
    assert contents(out) == contents(tmp_path / "straight/out")


def test_nan_in_a_weight_stops_the_run_with_its_name(command: Command, tmp_path: Path) -> None:
    source, name = random_model(tmp_path / "src", layouts.PT, **OF_128S), "model.layers.1.mlp.experts.1.up_proj.weight"
    table = tensors(source)
    table[name][5, 7] = float("nan")
    save_file(table, source / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("wint4", source, tmp_path / "out", "--experts-only")
    assert (code, err) == (1, f"error: {name}: holds NaN or infinity, which cannot be quantized\n")
    assert not list((tmp_path / "out").glob("model*"))


SLEEPER = """
import pathlib, signal, sys, time
from contextlib import contextmanager
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background may have it ignored
from ernie_quant.cli import _progress, main
out, flag = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[3] + ".ready")
@contextmanager
def progress_bar(*_):
    def progress(_):
        if len(list(out.glob("*.safetensors"))) == 2:
            flag.touch()
            time.sleep(60)
    yield progress
_progress.progress_bar = progress_bar
main.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_one_line_and_it_can_go_on(number: int, code: int, command: Command, tmp_path: Path) -> None:
    arguments = ["convert", str(SOURCE), str(tmp_path / "a/out"), "--to", "pt", "--max-shard-size", str(SMALL)]
    (tmp_path / "a").mkdir()
    with subprocess.Popen([sys.executable, "-c", SLEEPER, *arguments], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a/out.ready").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert err.strip() == "interrupted; the same command goes on where it stopped"
    before = stamps(tmp_path / "a/out")
    assert len(before) == 2
    assert command(*arguments)[0] == 0
    assert before.items() <= stamps(tmp_path / "a/out").items()
    arguments[2] = str(tmp_path / "b/out")
    assert command(*arguments)[0] == 0
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_complete_and_not_touched(command: Command, tmp_path: Path) -> None:
    arguments = ("convert", SOURCE, tmp_path / "out", "--to", "pt")
    assert command(*arguments)[0] == 0
    before, written = contents(tmp_path / "out"), stamps(tmp_path / "out")
    assert command(*arguments) == (0, f"{tmp_path / 'out'}: complete\n", "")
    assert contents(tmp_path / "out") == before
    assert stamps(tmp_path / "out") == written
    assert not (tmp_path / "out/.ernie-quant").exists()


def test_another_recipe_does_not_touch_a_finished_folder(tmp_path: Path) -> None:
    run_plan(planned(), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="holds the result of another plan"):
        run_plan(planned(rules=everything(RoundToNearest(8, 32))), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_another_recipe_does_not_go_on_with_a_begun_folder(tmp_path: Path) -> None:
    plan = planned()
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    with pytest.raises(OutputError, match="holds the beginning of another plan"):
        run_plan(planned(rules=everything(RoundToNearest(8, 32))), tmp_path / "out")


@pytest.mark.parametrize("begun", [False, True])
def test_restart_begins_anew(begun: bool, tmp_path: Path) -> None:
    old, new = planned(), planned(rules=everything(RoundToNearest(8, 32)), shard_bytes=10**9)
    if begun:
        with pytest.raises(Killed):
            run_plan(old, tmp_path / "a/out", progress=stop_in_second_shard(old))
    else:
        run_plan(old, tmp_path / "a/out")
    run_plan(new, tmp_path / "a/out", restart=True)
    run_plan(new, tmp_path / "b/out")
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_restart_leaves_a_strangers_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="was not made by ernie-quant"):
        run_plan(planned(), tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == {"model.safetensors": b"precious"}


@pytest.mark.parametrize("options", [(), ("--restart",)], ids=["again", "restart"])
def test_a_second_run_is_refused_and_harms_nothing(options: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    plan, out = planned(rules=recipe.KEEP_ALL), tmp_path / "a/out"
    answers: list[tuple[int, str, str]] = []

    def progress(_: int) -> None:
        if len(list(out.glob("*.safetensors"))) == 2 and not answers:
            answers.append(command("convert", SOURCE, out, "--to", "pt", "--max-shard-size", SMALL, *options))

    run_plan(plan, out, progress=progress)
    assert answers == [(75, "", f"error: {out}: another run is at work in this folder\n")]
    run_plan(plan, tmp_path / "b/out")
    assert contents(out) == contents(tmp_path / "b/out")


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputError, match=r"cannot be locked \(No locks available\); choose a folder on another disk"):
        run_plan(planned(), tmp_path / "out")


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    free = plan.disk_bytes + BYTES_PER_TENSOR * len(plan.steps) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(RetryError, match="more than the disk has free"):
        run_plan(plan, tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []
    free += 1
    run_plan(plan, tmp_path / "new/out")


def test_space_that_finished_files_take_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    free = plan.disk_bytes + BYTES_PER_TENSOR * len(plan.steps) - (tmp_path / "out" / plan.shards[0].filename).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    run_plan(plan, tmp_path / "out")


def test_a_disk_that_fills_up_is_worth_a_retry(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["convert", SOURCE, tmp_path / "a/out", "--to", "pt", "--max-shard-size", SMALL, "--workers", 2]
    write_at, calls = os.pwrite, 0

    def full(fd: int, data: bytes, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_at(fd, data, at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        code, out, err = command(*arguments)
    assert (code, out) == (75, "")
    assert re.fullmatch(
        r"error: .*/out/model-\d+-of-\d+\.safetensors: No space left on device; the same command goes on .*\n", err
    )
    assert not list((tmp_path / "a/out").glob("*.partial"))
    before = stamps(tmp_path / "a/out")
    assert before
    assert command(*arguments)[0] == 0
    assert before.items() <= stamps(tmp_path / "a/out").items()
    arguments[2] = tmp_path / "b/out"
    assert command(*arguments)[0] == 0
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_a_full_disk_at_the_first_write_is_worth_a_retry_too(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert command("convert", SOURCE, tmp_path / "out", "--to", "pt")[0] == 75


# --- memory ----------------------------------------------------------------------------------------------------------

RSS_OF_TORCH = "import torch; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')))"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_below_700_mb_above_torch(tmp_path: Path) -> None:
    """The largest tensors there are: embeddings and head of 1.7 GB, a dense up_gate_proj of 940 MB."""
    geometry = Path(__file__).parents[1] / "benchmarks/make_geometry.py"
    subprocess.run([sys.executable, geometry, "300b", tmp_path / "src", "--layers", "1", "--fill"], check=True)
    torch_kb = int(subprocess.run([sys.executable, "-c", RSS_OF_TORCH], check=True, capture_output=True).stdout)
    arguments = [sys.executable, "-m", "ernie_quant", "wint4", tmp_path / "src", tmp_path / "out", "--mtp", "--quiet"]
    peak_kb = 0
    with subprocess.Popen(arguments) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak_kb = max([peak_kb, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.01)
    assert process.returncode == 0
    print(f"peak RssAnon {peak_kb / 1e3:.0f} MB, importing torch {torch_kb / 1e3:.0f} MB")
    assert peak_kb * 1024 < torch_kb * 1024 + 700e6
