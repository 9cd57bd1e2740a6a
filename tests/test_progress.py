"""Progress: what a run tells of its bytes adds up, whatever was done before, and no stretch of bytes is silent."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from helpers.disk import contents
from helpers.runs import Killed, planned, stop_in_second_shard

from ernie_quant import disk, threads
from ernie_quant.run.whole import run_plan

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("real", "told"), [(10, 10), (10, 3), (3, 10), (7, 0), (0, 0)])
def test_proportions_end_together(real: int, told: int) -> None:
    found: list[int] = []
    hear = threads.in_proportion(found.append, real, told)
    for _ in range(real):
        hear(1)
    hear(0)
    assert sum(found) == told
    assert max(found) - min(found[:-1], default=0) <= 1  # evenly


def test_who_waits_for_a_result_is_told_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TICK", 0.01)
    ready, ticks = threading.Event(), []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 5:
            ready.set()

    assert list(threads.ordered(lambda i: ready.wait(20) and i, [3, 4], 1, tick=tick)) == [3, 4]
    assert len(ticks) >= 5


def test_a_tick_that_raises_wakes_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TICK", 0.01)
    wanted_no_more, woken = threading.Event(), []

    def tick() -> None:
        raise Killed

    with pytest.raises(Killed):
        next(threads.ordered(lambda _: woken.append(wanted_no_more.wait(20)), range(10), 2, wanted_no_more.set, tick))
    assert woken
    assert all(woken)


def test_a_timeout_of_the_work_itself_is_not_waited_for() -> None:
    def work(_: int) -> None:
        raise TimeoutError("of a socket")

    with pytest.raises(TimeoutError, match="of a socket"):
        next(threads.ordered(work, [1], 1))


# --- a run that goes on ----------------------------------------------------------------------------------------------


def test_hashing_finished_files_is_told_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = planned(), tmp_path / "out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    monkeypatch.setattr(disk, "CHUNK", 1000)
    first, done = plan.shards[0], []
    pieces = -(-(out / first.filename).stat().st_size // 1000)
    run_plan(plan, out, progress=done.append)
    assert sum(done) == plan.nbytes_in
    assert sum(done[:pieces]) == first.nbytes_in
    assert max(done[:pieces]) <= first.nbytes_in / pieces * 1.1


def test_it_may_be_stopped_while_finished_files_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = planned(), tmp_path / "stopped/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    monkeypatch.setattr(disk, "CHUNK", 1000)
    read: list[int] = []

    def stop(done: int) -> None:
        read.append(done)
        if len(read) == 5:
            raise Killed

    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop)
    assert len(read) == 5  # 5000 bytes of the first file
    run_plan(plan, out)
    run_plan(plan, tmp_path / "straight/out")
    assert contents(out) == contents(tmp_path / "straight/out")


def test_a_finished_file_that_is_written_again_counts_once(tmp_path: Path) -> None:
    plan, out = planned(), tmp_path / "out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    with open(out / plan.shards[0].filename, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xa5")
    done: list[int] = []
    run_plan(plan, out, progress=done.append)
    assert sum(done) == plan.nbytes_in
