"""How much room a run asks for: once for a result, twice for one that is quantized whole and then shared among ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.models import random_model

from ernie_quant.errors import RetryError
from ernie_quant.planning.built_in import fastdeploy_container
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.run.shared import run_shared
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

# two ranks have 64 inputs of every down_proj and o_proj, the least that FastDeploy shares
WIDTHS = {
    "hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 2,
    "num_hidden_layers": 2, "moe_layer_end_index": 1, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    source = random_model(tmp_path / "src", layouts.PADDLE, **WIDTHS)
    return make_plan(open_source(source), runtime="fastdeploy", recipe=fastdeploy_container("wint4", None))


def once(plan: Plan) -> int:
    """Bytes of the result: its weight files, and 1000 for each weight in index, report and manifest."""
    return plan.disk_bytes + 1000 * len(plan.steps)


def share(plan: Plan, out: Path) -> None:
    """Quantize, then share among 2 ranks."""
    run_shared(plan, out, 2, workers=1, restart=False, progress=lambda _: None)


def free(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk is said to have free from now on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=nbytes))


def test_a_result_that_is_shared_needs_room_for_two(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsplit one is deleted only when every rank is written."""
    free(2 * once(plan) - 1, monkeypatch)
    with pytest.raises(RetryError, match="more than the disk has free"):
        share(plan, tmp_path / "new/out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]  # nothing was begun
    free(2 * once(plan), monkeypatch)
    share(plan, tmp_path / "new/out")
    assert sorted(p.name for p in (tmp_path / "new/out").glob("rank*")) == ["rank0", "rank1"]


def test_a_result_that_stays_whole_needs_room_for_one(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(once(plan), monkeypatch)
    assert not run_plan(plan, tmp_path / "out").complete_before


def test_the_refusal_says_how_much_in_gigabytes(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of 3 GB, and 1.5 GB are free: whole it lacks 1.5 GB, and 4.5 GB if it is shared."""
    monkeypatch.setattr(Plan, "disk_bytes", 3 * 10**9)
    free(15 * 10**8, monkeypatch)
    with pytest.raises(
        RetryError, match=r"out: needs 3\.00 GB, 1\.50 GB more than the disk has free; --no-space-check begins all the same$"
    ):
        run_plan(plan, tmp_path / "out")
    with pytest.raises(
        RetryError, match=r"out: needs 6\.00 GB, 4\.50 GB more than the disk has free; --no-space-check begins all the same$"
    ):
        share(plan, tmp_path / "out")
