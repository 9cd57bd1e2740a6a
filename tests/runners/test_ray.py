"""A Ray cluster in trouble: dead workers, dead nodes, shaky drives, full disks, folders that nobody shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import clusters
from helpers.clusters import On, two_nodes
from helpers.commands import Command
from helpers.disk import contents
from helpers.runs import SMALL, SOURCE, planned

from ernie_quant.errors import CheckpointError, ClusterError
from ernie_quant.planning.steps import Plan
from ernie_quant.run.whole import run_plan
from ernie_quant.runners import ray as ray_runner


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(shard_bytes=SMALL)


@pytest.fixture(scope="module")
def wanted(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("wanted") / "out"
    run_plan(plan, out)
    return contents(out)


def tries(marks: Path, number: int = 2) -> int:
    """How often a file was begun."""
    return len(list(marks.glob(f"model-0000{number}-*")))


@pytest.mark.parametrize("kind", [clusters.Killed, clusters.Shaken], ids=lambda kind: kind.__name__)
def test_trouble_that_passes(kind: Any, cluster: Any, plan: Plan, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """A worker that is killed in the middle of a write, and a drive that is away: the file is written again."""
    run_plan(plan, tmp_path / "out", runner=On(kind, tmp_path / "marks"), workers=1)
    assert contents(tmp_path / "out") == wanted
    assert (tries(tmp_path / "marks"), tries(tmp_path / "marks", 1)) == (2, 1)


@pytest.mark.parametrize(
    ("kind", "error", "line"),
    [
        (clusters.Broken, CheckpointError, "model.safetensors: is no good"),
        (clusters.Full, OSError, "[Errno 28] No space left on device: 'model-2'"),
    ],
)
def test_trouble_that_stays(
    kind: Any, error: type[Exception], line: str, cluster: Any, plan: Plan, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """It is said as it is where there is one process, at once; what is finished by then is kept."""
    with pytest.raises(error) as raised:
        run_plan(plan, tmp_path / "out", runner=On(kind, tmp_path / "marks"), workers=1)
    assert (type(raised.value), str(raised.value)) == (error, line)
    assert tries(tmp_path / "marks") == 1
    assert not list((tmp_path / "out").rglob("*.partial"))
    run_plan(plan, tmp_path / "out", runner=ray_runner, workers=1)
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("look", "line"),
    [
        (clusters.sees_nothing, "does not see it; all nodes must share the output folder"),
        (clusters.sees_no_source, f"{SOURCE}: is not there on node "),
        (clusters.has_another_torch, r" has torch 1\.0, here .*; all nodes must have the same versions"),
    ],
)
def test_nodes_are_looked_at_before_anything_is_written(
    look: Callable[..., object], line: str, cluster: Any, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernie_quant.runners._ray._seen_from_a_node", look)
    with pytest.raises(ClusterError, match=line):
        run_plan(plan, tmp_path / "out", runner=ray_runner)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".ernie-quant"]
    assert not list((tmp_path / "out/.ernie-quant").glob("seen*"))


def test_more_than_a_node_has(cluster: Any, command: Command, tmp_path: Path) -> None:
    line = ("convert", SOURCE, tmp_path / "out", "--to", "pt", "--ray", "auto")
    code, out, err = command(*line, "--ray-gpus", 2)
    assert (code, out) == (1, "")
    assert err == "error: --ray-gpus 2: the largest of the 2 node(s) of the Ray cluster has 0 GPUs\n"
    code, out, err = command(*line, "--workers", 6)
    assert (code, out) == (1, "")
    assert err == "error: --workers 6: the largest of the 2 node(s) of the Ray cluster has 5 CPUs\n"
    assert command(*line)[0] == 0


def test_relative_paths_are_those_of_the_one_who_types(
    cluster: Any, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").symlink_to(SOURCE)
    monkeypatch.chdir(tmp_path)
    assert command("convert", "src", "out", "--to", "pt", "--ray", "auto")[::2] == (0, "")
    assert (tmp_path / "out/ernie-quant.json").is_file()


@pytest.mark.slow
def test_a_node_dies_in_the_middle_of_a_file(cluster: Any, plan: Plan, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Ungracefully, as when its power is cut; another node writes the file, and nothing of the first try is left."""
    node = cluster.add_node(num_cpus=1)
    marks = tmp_path / "marks"
    marks.mkdir()
    (marks / "node").write_text(node.node_id)

    def cut_the_power() -> None:
        while not (marks / "stuck").exists():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    power = threading.Thread(target=cut_the_power, daemon=True)
    power.start()
    run_plan(plan, tmp_path / "out", runner=On(clusters.Stuck, marks), workers=1)
    power.join(10)
    assert contents(tmp_path / "out") == wanted
    assert (marks / "stuck").exists()
