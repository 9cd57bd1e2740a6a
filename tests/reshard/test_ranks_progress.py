"""`--tp`: sharing among ranks tells of its bytes as quantizing does, and may be stopped anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.disk import contents
from helpers.runs import Killed

from ernie_quant import disk
from ernie_quant.planning.built_in import fastdeploy_container
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.run.shared import run_shared, shared_bytes
from ernie_quant.sources import open_source

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
HOW: dict[str, Any] = {"workers": 2, "restart": False}


@pytest.fixture
def plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(disk, "CHUNK", 1 << 18)  # small files have several pieces too
    rules = fastdeploy_container("wint2", 2, effort=1)
    return make_plan(open_source(folder / "src"), runtime="fastdeploy", recipe=rules, shard_bytes=1_000_000)


@pytest.fixture
def straight(plan: Plan, tmp_path: Path) -> tuple[list[int], Path]:
    """What a run told that nobody stopped, and its folder."""
    done: list[int] = []
    run_shared(plan, tmp_path / "straight/out", 2, progress=done.append, **HOW)
    return done, tmp_path / "straight/out"


def test_sharing_is_told_too(plan: Plan, straight: tuple[list[int], Path]) -> None:
    done, _ = straight
    assert sum(done) == shared_bytes(plan, 2) == plan.nbytes_in + plan.nbytes
    shared = done[next(i for i in range(len(done)) if sum(done[: i + 1]) >= plan.nbytes_in) + 1 :]
    assert sum(shared) == plan.nbytes
    assert len([n for n in shared if n]) > 20  # of one weight after the other
    assert max(shared) < plan.nbytes / 5


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.7, 0.85, 0.99])
def test_it_may_be_stopped_anywhere_and_goes_on(
    share: float, plan: Plan, straight: tuple[list[int], Path], tmp_path: Path
) -> None:
    total, told = shared_bytes(plan, 2), 0

    def stop(done: int) -> None:
        nonlocal told
        told += done
        if told > share * total:
            raise Killed

    out = tmp_path / "stopped/out"
    with pytest.raises(Killed):
        run_shared(plan, out, 2, progress=stop, **HOW)
    assert told < (share + 0.15) * total
    assert not (out / "ernie-quant.json").exists()
    done: list[int] = []
    run_shared(plan, out, 2, progress=done.append, **HOW)
    assert sum(done) == total  # the bar reaches its end
    assert contents(out) == contents(straight[1])
