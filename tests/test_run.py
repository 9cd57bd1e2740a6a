"""Runs: the same bytes whatever happens on the way, and files whose sizes are known before."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.disk import contents
from helpers.models import GOLDEN, copy, random_model, same, tensors, write
from helpers.runs import INT4, OF_128S, SOURCE, everything, planned

from ernie_quant import names, threads
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.planning import recipe
from ernie_quant.run.whole import run_plan
from ernie_quant.weights import layouts
from ernie_quant.writers.safetensors import lay_out

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


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
