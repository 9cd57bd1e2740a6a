"""A hub's files are brought by one process, and read by others."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import NAME, least_budget

from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import ShardJob
from ernie_quant.run.whole import run_plan
from ernie_quant.runners import processes
from ernie_quant.sources import open_source


def test_processes_read_from_a_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Files come one after the other and are deleted after their use, whoever reads them."""
    assert hub.endpoint
    plan = make_plan(open_source(f"hf://{NAME}"), runtime="vllm", shard_bytes=100_000)
    assert len(plan.shards) > 2
    jobs = [ShardJob(shard, plan.runtime, plan.metadata, {}) for shard in plan.shards]
    assert [pickle.loads(pickle.dumps(job)) for job in jobs] == jobs
    run_plan(plan, tmp_path / "one/out")
    run_plan(plan, tmp_path / "many/out", runner=processes, workers=1)
    assert contents(tmp_path / "many/out") == contents(tmp_path / "one/out")
    assert list((tmp_path / "cache").rglob("files/*")) == []


@pytest.mark.timeout(60)
def test_processes_wait_for_room_on_disk_and_not_for_each_other(hub: LoopbackHub, tmp_path: Path) -> None:
    """With room for one job's files alone, the next job's cannot come before the first is done; every job needs two."""
    assert hub.endpoint
    plan = make_plan(open_source(f"hf://{NAME}"), runtime="vllm", shard_bytes=100_000)
    assert min(len(shard.needs) for shard in plan.shards) >= 1
    assert max(len(shard.needs) for shard in plan.shards) >= 2
    run_plan(plan, tmp_path / "many/out", runner=processes, workers=1, disk_budget=least_budget(plan))
    run_plan(plan, tmp_path / "one/out")
    assert contents(tmp_path / "many/out") == contents(tmp_path / "one/out")
