"""A hub's files are brought by one process, and read by others."""

from __future__ import annotations

import pickle
from pathlib import Path

from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import NAME

from ernie_quant.plan.make import make_plan
from ernie_quant.plan.steps import ShardJob
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source


def test_processes_read_from_a_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Files come one after the other and are deleted after their use, whoever reads them."""
    assert hub.endpoint
    plan = make_plan(open_source(f"hf://{NAME}"), runtime="vllm", shard_bytes=100_000)
    assert len(plan.shards) > 2
    jobs = [ShardJob(shard, plan.runtime, plan.metadata, {}) for shard in plan.shards]
    assert [pickle.loads(pickle.dumps(job)) for job in jobs] == jobs
    run_plan(plan, tmp_path / "one/out")
    run_plan(plan, tmp_path / "many/out", runner="processes", workers=1)
    assert contents(tmp_path / "many/out") == contents(tmp_path / "one/out")
    assert list((tmp_path / "cache").rglob("files/*")) == []
