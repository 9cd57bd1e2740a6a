"""A hub's files are brought by each of several processes, here and on other machines, within the budget of each disk."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest
from helpers.clusters import two_nodes
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, SHARDS, SOURCE, files_of, planned, same_result, watched, weights_asked

from ernie_quant.checkpoint import OnDisk
from ernie_quant.errors import CheckpointError
from ernie_quant.planning.share import Share
from ernie_quant.run.share import merge_shares, run_share
from ernie_quant.run.whole import run_plan
from ernie_quant.runners import ray as ray_runner
from ernie_quant.sources import open_source
from ernie_quant.sources.elsewhere import Elsewhere, side_by_side


def sizes(*numbers: int) -> int:
    return sum((SOURCE / SHARDS[number]).stat().st_size for number in numbers)


def test_a_source_is_opened_again_where_it_is_needed(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its commit, in another cache: as on another machine. What it was for is deleted then."""
    assert hub.endpoint
    source = open_source(ADDRESS)
    here = [source.folder / SHARDS[0], source.folder / SHARDS[2]]
    elsewhere = pickle.loads(pickle.dumps(Elsewhere.of(source, [here], None)))
    assert elsewhere.address == f"{ADDRESS}@{source.revision}"
    monkeypatch.setenv("ERNIE_QUANT_CACHE", str(cache / "other"))
    with elsewhere.download(here, {}) as download:
        assert [download.path(path).read_bytes() for path in here] == [(SOURCE / p.name).read_bytes() for p in here]
        assert all(download.path(path).is_relative_to(cache / "other") for path in here)
        assert download.path(Path("/somewhere/statistics")) == Path("/somewhere/statistics")
    assert not files_of(cache / "other")


def test_a_folder_is_where_it_is() -> None:
    source = open_source(SOURCE)
    elsewhere = Elsewhere.of(source, [[SOURCE / SHARDS[0]]], None)
    with elsewhere.download([SOURCE / SHARDS[0]], source.stamps) as download:
        assert download == OnDisk(source.stamps)
    assert side_by_side(source) is source


def test_processes_share_the_budget_of_their_disk(hub: LoopbackHub) -> None:
    """As many at a time as it has room for, each with its part."""
    assert hub.endpoint
    source = open_source(ADDRESS)
    needs = [[source.folder / SHARDS[0], source.folder / SHARDS[1]], [source.folder / SHARDS[2]]]
    most = max(sizes(0, 1), sizes(2))
    assert (Elsewhere.of(source, needs, most).most, Elsewhere.of(source, needs, most).budget) == (1, most)
    shared = Elsewhere.of(source, needs, 2 * most + 1000)
    assert (shared.most, shared.budget) == (2, most + 500)
    with pytest.raises(CheckpointError, match="are needed at once, more than the disk budget"):
        Elsewhere.of(source, needs, most - 1)


def test_who_finds_no_place_waits(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.endpoint
    monkeypatch.setattr("ernie_quant.sources.elsewhere.WAIT", 0.01)
    source = side_by_side(open_source(ADDRESS), most=2)
    needs = [[source.folder / SHARDS[0]]]
    events = []

    def third() -> None:
        with source.download(needs) as download:
            events.append(download.path(needs[0][0]).parts[-3])

    with source.download(needs) as second:
        with source.download(needs) as first:
            assert {one.path(needs[0][0]).parts[-3] for one in (first, second)} == {"place-0", "place-1"}
            waiting = threading.Thread(target=third)
            waiting.start()
            waiting.join(0.2)
            assert events == []
        waiting.join(20)
        assert events == ["place-1"]


def test_shares_bring_what_they_need(
    hub: LoopbackHub, cache: Path, tmp_path: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two needs the first files only; they may run at once on one machine."""
    assert hub.endpoint
    plan, out = planned(), tmp_path / "out"
    mine = [Share(index, 2).files(plan) for index in range(2)]
    needs = [{path.name for shard in files for path in shard.needs} for files in mine]
    assert needs[0] != needs[1]
    budget = plan.source.downloader.needed_at_once([shard.needs for shard in mine[1]])  # type: ignore[union-attr]
    with watched(cache, monkeypatch) as seen:
        run_share(plan, out, Share(1, 2), {}, disk_budget=budget)
    assert 0 < max(seen) <= budget
    assert {name for name, _ in weights_asked(hub)} >= needs[1]
    with side_by_side(plan.source).download([[plan.source.folder / SHARDS[0]]]):  # another process is at work
        run_share(plan, out, Share(0, 2), {})
    merge_shares(planned(), out, 2)
    assert same_result(out, local)
    assert not files_of(cache)


@pytest.mark.slow
def test_nodes_bring_what_their_files_need(
    hub: LoopbackHub, cache: Path, tmp_path: Path, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tokens, caches and addresses of their own environments; this process brings no weights."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    plan = planned()
    before = len(weights_asked(hub))
    monkeypatch.setenv("ERNIE_QUANT_CACHE", str(tmp_path / "nodes"))
    with two_nodes():
        monkeypatch.setenv("ERNIE_QUANT_CACHE", str(cache))
        budget = max(plan.source.downloader.needed_at_once([shard.needs]) for shard in plan.shards)  # type: ignore[union-attr]
        run_plan(plan, tmp_path / "out", runner=ray_runner, workers=1, disk_budget=2 * budget)
    assert same_result(tmp_path / "out", local)
    assert len(weights_asked(hub)) > before
    assert list((tmp_path / "nodes").glob("*/*/place-0"))
    assert not list(cache.rglob("place-*"))
    assert not [p for p in (tmp_path / "nodes").rglob("place-*/files/*") if p.is_file()]
    run_plan(plan, tmp_path / "one/out")
    assert contents(tmp_path / "one/out") == contents(tmp_path / "out")
