"""The short version of the fault harness: runs that are broken in every way end with the bytes of an unbroken one.

The long version: `python tests/faults/kills.py` and `python tests/faults/full_disk.py`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest
from faults import full_disk, kills
from faults._bench import Bench, Tally

THREE = ["convert", "wint4", "wint2"]
SHARED = "wint2 --tp 2"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("faults"), fsync=False, width=256) as bench:
        yield bench


def check(*tallies: Tally) -> None:
    failures = [failure for tally in tallies for failure in tally.failures]
    assert not failures, "\n".join(["", *failures])


def test_a_run_that_is_killed_at_any_time_goes_on_to_the_bytes_of_an_unbroken_one(bench: Bench) -> None:
    tallies = kills.all_kills(bench, THREE, kills=9, seed=1)
    check(*tallies)
    assert sum(t.stopped for t in tallies) >= 9
    assert sum(t.kept for t in tallies) > 0


@pytest.mark.parametrize("name", [*THREE, SHARED])
def test_so_does_a_run_that_is_killed_between_two_file_operations(name: str, bench: Bench) -> None:
    """Evenly over the run, and at its end: index, config, manifest, private state."""
    tally, last = Tally(name), len(bench.reference(name).operations)
    for at in {1, last // 3, 2 * last // 3, last - 12, last - 3, last}:
        assert kills.kill_before(bench, name, at, tally)
    check(tally)


@pytest.mark.parametrize("begun", [False, True], ids=["finished", "begun"])
def test_a_killed_restart_leaves_nothing_that_claims_to_be_complete_and_is_not(begun: bool, bench: Bench) -> None:
    """Before, in the middle of and after the removal of the old files."""
    tally = Tally("wint4")
    for at in (1, 7, 14, 60):
        assert kills.kill_restart_before(bench, "convert", "wint4", at, tally, begun=begun)
    check(tally)


def test_sigterm_and_sigint_end_a_run_with_one_line_and_it_can_go_on(bench: Bench) -> None:
    tallies = kills.all_interrupts(bench, THREE, trials=9, seed=3)
    check(*tallies)
    assert sum(t.stopped for t in tallies) > 2


def test_of_two_runs_at_once_one_does_the_work_and_the_other_says_so(bench: Bench) -> None:
    tallies = [Tally(name) for name in THREE]
    for i, tally in enumerate(tallies):
        for other, kill in ((tally.command, False), (THREE[i - 1], False), (tally.command, True)):
            kills.two_at_once(bench, tally.command, other, random.Random(i), tally, kill=kill)
    check(*tallies)
    assert {t.identical for t in tallies} == {3}


@pytest.mark.parametrize("name", ["wint4", SHARED])
def test_a_run_that_stands_still_while_another_one_does_the_work_harms_nothing(name: str, bench: Bench) -> None:
    """A race, in slow motion: before it has taken the folder, in the middle, and at its end."""
    tally, last = Tally(name), len(bench.reference(name).operations)
    for at in (1, 3, 6, last // 2, last - 3, last):
        assert kills.stand_still(bench, name, at, tally)
    check(tally)


def test_nothing_depends_on_the_clock(bench: Bench) -> None:
    """It runs backwards, and the files of a begun run are from 1970 and from 2100."""
    tallies = kills.all_kills(bench, THREE, kills=4, seed=4, between=kills.another_year)
    check(*tallies)
    assert sum(t.stopped for t in tallies) >= 4


@pytest.mark.parametrize("how", ["poke", "truncate", "delete"])
def test_a_source_that_changes_while_it_is_read_stops_the_run(how: str, bench: Bench) -> None:
    tallies = [Tally(name) for name in THREE]
    for tally in tallies:
        for at in kills.while_reading(bench, tally.command, moments=3):
            kills.source_changes(bench, tally.command, how, at, tally)
    check(*tallies)
    assert {t.stopped for t in tallies} == {3}


@pytest.mark.parametrize("inject", [False, True], ids=["tmpfs", "injected"])
def test_a_disk_that_fills_up_is_worth_a_retry_at_any_size(inject: bool, bench: Bench) -> None:
    if not inject and not full_disk.can_mount():
        pytest.skip("mounting is not allowed")
    tallies = full_disk.all_sizes(bench, ["wint2"] if inject else THREE, sizes=3, inject=inject)
    check(*tallies)
    assert {t.stopped for t in tallies} == {3}


def test_a_full_quota_is_a_full_disk(bench: Bench) -> None:
    (tally,) = full_disk.all_sizes(bench, ["wint2"], sizes=2, inject=True, number="EDQUOT")
    check(tally)
    assert tally.stopped == 2


def test_a_disk_that_is_too_small_or_cannot_be_written_is_left_alone(bench: Bench) -> None:
    (tally,) = full_disk.all_refusals(bench, ["wint4"], inject=not full_disk.can_mount())
    check(tally)
    assert tally.stopped == 3


def test_the_long_version_shows_a_table_and_every_failure(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Tally("wint4", stopped=3, identical=3, finished=5, kept=4), Tally("wint2", stopped=1)
    assert bad.add(["one thing", "another"], "killed") is False
    assert kills.show("kill -9", [good]) == 0
    assert "wint4    3        3          4 of 5      0" in capsys.readouterr().out
    assert kills.show("kill -9", [good, bad]) == 1
    assert "FAILED wint2, killed: one thing\nFAILED wint2, killed: another\n" in capsys.readouterr().out
