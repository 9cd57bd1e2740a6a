"""A shard is a job that can leave the process: it is pickled, written elsewhere, and gives the same bytes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers.disk import contents
from helpers.models import random_model

from ernie_quant.checkpoint import Download, OnDisk, TensorSpec
from ernie_quant.codecs import Encoder
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import CheckpointError, ErnieQuantError, PlanError, RetryError
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.planning.reshard import make_reshard_plan
from ernie_quant.planning.steps import Plan, ShardJob, in_order
from ernie_quant.reporting.rows import ShardResult
from ernie_quant.run.shard import run_shard
from ernie_quant.run.whole import run_plan
from ernie_quant.runners import Common, local, processes
from ernie_quant.sources import open_source
from ernie_quant.threads import Progress
from ernie_quant.weights import layouts

WIDTHS = {"hidden_size": 128, "intermediate_size": 512, "moe_intermediate_size": 256, "moe_num_experts": 2, "vocab_size": 64}
WIDTHS |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "moe_num_shared_experts": 0}
Encoded = dict[str, torch.Tensor]
KINDS = ("convert", "wint4", "fp8", "wint2", "reshard", "dequantize")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its container in 2 bits."""
    root = tmp_path_factory.mktemp("jobs")
    random_model(root / "src", layouts.PADDLE, "moe_mtp", **WIDTHS)
    rules = built_in.make("wint2", wint4_layers=2, effort=1)
    run_plan(make_plan(open_source(root / "src"), runtime=rules.runtime, recipe=rules.recipe), root / "container")
    return root


def planned(kind: str, folder: Path) -> Plan:
    """A plan of several files of this kind."""
    if kind == "reshard":
        return make_reshard_plan(open_source(folder / "container"), 2)
    if kind == "dequantize":
        return make_plan(open_source(folder / "container"), runtime="vllm", dequantize=True, shard_bytes=200_000)
    made = built_in.make("pt" if kind == "convert" else kind, **({"wint4_layers": 2, "effort": 1} if kind == "wint2" else {}))
    return make_plan(open_source(folder / "src"), runtime=made.runtime, recipe=made.recipe, shard_bytes=200_000)


def jobs(plan: Plan) -> list[ShardJob]:
    return [ShardJob(shard, plan.runtime, plan.metadata, plan.source.stamps) for shard in plan.shards]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_was_pickled_writes_the_same_file(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = planned(kind, folder)
    assert len(plan.shards) > 1
    for job in jobs(plan):
        again = pickle.loads(pickle.dumps(job))
        assert again == job
        results = []
        for name, work in (("here", job), ("there", again)):
            download = OnDisk(work.stamps)
            results.append(run_shard(work, folder=tmp_path / name, workers=2, progress=lambda _: None, download=download))
        assert results[0] == results[1] == pickle.loads(pickle.dumps(results[1]))
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_a_result_is_what_is_recorded_and_restored(folder: Path, tmp_path: Path) -> None:
    job = jobs(planned("wint4", folder))[0]
    result = run_shard(job, folder=tmp_path, workers=1, progress=lambda _: None, download=OnDisk(job.stamps))
    assert (tmp_path / result.filename).stat().st_size == result.nbytes
    assert ShardResult.from_json(result.filename, result.to_json()) == result


def test_processes_write_what_one_process_writes(folder: Path, tmp_path: Path) -> None:
    """A quantized source, whose decoding crosses to the other processes too; the bar reaches its end."""
    plan = planned("dequantize", folder)
    done: list[int] = []
    run_plan(plan, tmp_path / "one/out")
    run_plan(plan, tmp_path / "many/out", runner=processes, workers=1, progress=done.append)
    assert contents(tmp_path / "many/out") == contents(tmp_path / "one/out")
    assert sum(done) == sum(shard.nbytes_in for shard in plan.shards)


@pytest.mark.parametrize("error", [CheckpointError("a: b"), PlanError("no", ["one", "two"]), RetryError("later")], ids=repr)
def test_an_error_crosses_to_another_process(error: ErnieQuantError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.slow
def test_what_fails_in_another_process_fails_here(folder: Path, tmp_path: Path) -> None:
    plan = planned("wint4", folder)
    broken = {path: replace(stamp, nbytes=stamp.nbytes + 1) for path, stamp in plan.source.stamps.items()}
    common = Common(plan.source, tmp_path, workers=1)
    work = processes.map_jobs(Named(tmp_path), [replace(job, stamps=broken) for job in jobs(plan)], lambda _: None, common)
    with pytest.raises(Exception, match="has changed since the run began"):
        list(work)


class Named:
    """`run_shard` into a folder; a class, because a function of a test cannot be sent to another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, job: ShardJob, *, workers: int, progress: Progress, download: Download) -> ShardResult:
        return run_shard(job, folder=self.folder, workers=workers, progress=progress, download=download)


# --- order -----------------------------------------------------------------------------------------------------------


def test_files_are_written_after_those_they_must_come_after(folder: Path, tmp_path: Path) -> None:
    """The plan says it, whatever the order in which the files are named."""
    plan = planned("convert", folder)
    names = [shard.filename for shard in plan.shards]
    assert len(names) > 2
    # each before the one of the smaller number
    backwards = tuple(replace(s, after=(after,)) for s, after in zip(plan.shards, names[1:], strict=False)) + plan.shards[-1:]
    assert [shard.filename for shard in in_order(backwards)] == names[::-1]
    written: list[str] = []

    class Order:
        def map_jobs(self, work, jobs, progress, common) -> Iterator[ShardResult]:  # type: ignore[no-untyped-def]
            for result in local.map_jobs(work, jobs, progress, common):
                written.append(result.filename)
                yield result

    run_plan(replace(plan, shards=backwards), tmp_path / "out", runner=Order())
    assert written == names[::-1]
    run_plan(plan, tmp_path / "plain/out")
    weights = {n: d for n, d in contents(tmp_path / "out").items() if n.endswith(".safetensors")}
    assert weights == {n: d for n, d in contents(tmp_path / "plain/out").items() if n.endswith(".safetensors")}


def test_files_that_wait_for_each_other_are_our_own_mistake(folder: Path) -> None:
    one, two, *_ = planned("convert", folder).shards
    with pytest.raises(AssertionError, match="waits for itself"):
        in_order([replace(one, after=(two.filename,)), replace(two, after=(one.filename,))])


def test_one_thread_of_torch_while_a_shard_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs are the parallel work, in whatever process."""
    job, seen = jobs(planned("wint4", folder))[0], []
    monkeypatch.setattr("ernie_quant.run.shard.encode_slab", spied(seen))
    torch.set_num_threads(3)
    try:
        run_shard(job, folder=tmp_path, workers=2, progress=lambda _: None, download=OnDisk(job.stamps))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert seen
    assert set(seen) == {1}


def spied(seen: list[int]):  # type: ignore[no-untyped-def]
    from ernie_quant.run.shard import encode_slab

    def spy(*arguments, **options):  # type: ignore[no-untyped-def]
        seen.append(torch.get_num_threads())
        return encode_slab(*arguments, **options)

    return spy


# --- what is prepared once per weight --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large(RoundToNearest):
    """A codec whose encoders say how many of them are alive."""

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        return Counted(self)


class Counted:
    """Encodes as its codec does."""

    made = alive = most = 0
    once: ClassVar[dict[str, torch.Tensor]] = {}

    def __init__(self, codec: RoundToNearest) -> None:
        self.codec = codec
        Counted.made += 1
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1

    def encode(self, weight: torch.Tensor) -> Encoded:
        return self.codec.encode(weight)


@pytest.mark.parametrize("workers", [1, 3])
def test_few_encoders_are_alive_and_each_weight_has_one(
    workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many weights and slabs there are: a factor of 8192 inputs has 256 MiB."""
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 20_000)
    monkeypatch.setattr(Counted, "made", 0)
    monkeypatch.setattr(Counted, "most", 0)
    (shard,) = of_experts(Large(4, 32), folder).shards
    quantized = [step for step in shard.steps if step.quantized]
    assert len(quantized) > 10
    assert all(len(step.slabs()) > 1 for step in quantized)
    run_plan(of_experts(Large(4, 32), folder), tmp_path / "prepared/out", workers=workers)
    assert Counted.made == len(quantized)
    assert 1 <= Counted.most <= workers + 1
    assert Counted.alive == 0
    run_plan(of_experts(RoundToNearest(4, 32), folder), tmp_path / "plain/out", workers=workers)
    weights = [(tmp_path / place / "out/model.safetensors").read_bytes() for place in ("prepared", "plain")]
    assert weights[0] == weights[1]


def of_experts(codec: RoundToNearest, folder: Path) -> Plan:
    rules = Recipe("test", (RecipeRule(codec, ("experts",)),))
    return make_plan(open_source(folder / "src"), runtime="vllm", recipe=rules)


def test_a_codec_that_cannot_prepare_fails_by_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for the same encoder end too, and nothing stays behind."""

    def prepare(self: Large, spec: TensorSpec, statistics: Encoded) -> Encoder:
        raise CheckpointError("no statistics")

    monkeypatch.setattr(Large, "prepare", prepare)
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 20_000)
    with pytest.raises(CheckpointError, match="no statistics"):
        run_plan(of_experts(Large(4, 32), folder), tmp_path / "out", workers=3)
    assert list((tmp_path / "out").glob("model*")) == []
