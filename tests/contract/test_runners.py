"""Every runner writes the same bytes: with any number of workers, after a restart in the middle, and after another runner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from helpers.clusters import two_nodes
from helpers.disk import contents, stamps
from helpers.runs import SMALL, Killed, planned

from ernie_quant import plugins, runners
from ernie_quant.planning.steps import Plan
from ernie_quant.run.whole import FileDone, run_plan
from ernie_quant.runners import Runner

NAMES = plugins.names(runners)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with two_nodes():
        yield


@pytest.fixture
def find(request: pytest.FixtureRequest) -> Callable[[str], Runner]:
    """A runner, with a cluster for that of Ray."""

    def found(name: str) -> Runner:
        if name == "ray":
            request.getfixturevalue("cluster")
        return runners.find(name)

    return found


@pytest.fixture(scope="module")
def plan() -> Plan:
    plan = planned(shard_bytes=SMALL)
    assert len(plan.shards) > 3
    return plan


@pytest.fixture(scope="module")
def wanted(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes that nobody stops."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    run_plan(plan, out)
    return contents(out)


def after_two_files(done: FileDone) -> None:
    if done.number == 2:
        raise Killed


def begun(plan: Plan, out: Path, runner: Runner) -> dict[str, tuple[int, int]]:
    """Stopped after two files: the files that are finished, and when they were."""
    with pytest.raises(Killed):
        run_plan(plan, out, runner=runner, workers=1, each=after_two_files)
    assert not list(out.rglob("*.partial"))
    recorded = {p.name.removesuffix(".json") for p in (out / ".ernie-quant").glob("model-*.json")}
    assert len(recorded) >= 2
    return {name: stamp for name, stamp in stamps(out).items() if name in recorded}


def slow_where(slow: bool, *values: object) -> ParameterSet:
    """Processes that start import PyTorch and numba: seconds each."""
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "workers"), [slow_where(name == "processes", name, n) for name in NAMES for n in (1, 2, 5)])
def test_the_number_of_workers_does_not_show(
    name: str, workers: int, plan: Plan, wanted: dict[str, bytes], find: Callable[[str], Runner], tmp_path: Path
) -> None:
    done: list[int] = []
    files: list[FileDone] = []
    run_plan(plan, tmp_path / "out", runner=find(name), workers=workers, progress=done.append, each=files.append)
    assert contents(tmp_path / "out") == wanted
    assert sum(done) == plan.nbytes_in
    assert sorted(file.filename for file in files) == sorted(shard.filename for shard in plan.shards)


@pytest.mark.parametrize(
    ("first", "second"),
    [slow_where("processes" in pair, *pair) for pair in itertools.product(NAMES, NAMES)],
)
def test_a_runner_goes_on_where_one_has_stopped(
    first: str, second: str, plan: Plan, wanted: dict[str, bytes], find: Callable[[str], Runner], tmp_path: Path
) -> None:
    before = begun(plan, tmp_path / "out", find(first))
    result = run_plan(plan, tmp_path / "out", runner=find(second))
    assert result.files_before == len(before)
    assert before.items() <= stamps(tmp_path / "out").items()
    assert contents(tmp_path / "out") == wanted
