"""A hub as a source: a run stays with its commit, and runs share one cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.commands import Command, refusal
from helpers.hub import LoopbackHub
from helpers.hubs import (
    ADDRESS,
    NAME,
    SHARDS,
    SOURCE,
    files_of,
    least_budget,
    planned,
    run_with,
    same_result,
    watched,
    weights_asked,
)
from helpers.lying import Lying, open_lying
from helpers.models import GOLDEN

from ernie_quant.check.verify import verify
from ernie_quant.errors import ErnieQuantError
from ernie_quant.hubs import Listing
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source


def test_a_run_stays_with_its_commit_when_main_moves(hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path) -> None:
    plan = planned()
    before = plan.source.revision
    after = hub.put(NAME, {name: GOLDEN / "moe_mtp/paddle" / name.replace("00005", "00006") for name in SHARDS})
    run_plan(plan, tmp_path / "out")
    assert same_result(tmp_path / "out", local)
    assert before != after
    assert open_source(f"{ADDRESS}@{before}").revision == before


def test_branches_tags_and_commits_are_revisions(hub: LoopbackHub) -> None:
    first = hub.repo(NAME).branches["main"]
    hub.repo(NAME).tags["v1"] = first
    second = hub.put(NAME, SOURCE, revision="a/branch", message="another")
    assert [open_source(f"{ADDRESS}@{r}").revision for r in ("v1", first, "main", "a/branch")] == [first] * 3 + [second]


class Enough(Exception):
    pass


def test_a_stopped_run_goes_on_with_an_empty_cache(
    hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, cache: Path
) -> None:
    """New files in the cache have new times; they say nothing about the hub's."""

    def progress(_: int) -> None:
        if len(list((tmp_path / "out").glob("*.safetensors"))) == 2:
            raise Enough

    with pytest.raises(Enough):
        run_plan(planned(), tmp_path / "out", progress=progress)
    shutil.rmtree(cache)
    assert run_plan(planned(), tmp_path / "out").files_before == 2
    assert same_result(tmp_path / "out", local)


def test_a_finished_result_needs_no_weights(hub: LoopbackHub, tmp_path: Path, short_heads: None) -> None:
    run_plan(planned(), tmp_path / "out")
    hub.requests.clear()
    assert run_plan(planned(), tmp_path / "out").complete_before
    assert weights_asked(hub) == []


def test_a_second_run_with_the_same_cache_waits_for_another_time(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    source = open_source(ADDRESS)
    with source.download([list(source.ranks[0].files)]):
        code, _, err = command("wint4", ADDRESS, tmp_path / "out", "--group-size", "32", "-q")
        assert command("inspect", ADDRESS)[0] == 0  # which needs no weights
    assert (code, err.count("\n")) == (75, 1)
    assert "another run is downloading it to" in err
    assert command("wint4", ADDRESS, tmp_path / "out", "--group-size", "32", "-q")[0] == 0


def test_older_commits_are_swept_unless_a_run_is_at_work_with_them(hub: LoopbackHub, cache: Path) -> None:
    """From the first look on, not only while it downloads: between the targets of a night nothing is downloaded."""
    first = open_source(ADDRESS)
    commits = cache / "hf--baidu--ERNIE-tiny-Paddle"
    (commits / first.revision / "files").mkdir()
    (commits / first.revision / "files/model.safetensors.partial").write_bytes(b"left")
    hub.put(NAME, {"generation_config.json": b"{}"})
    second = open_source(ADDRESS)
    assert {p.name for p in commits.iterdir()} == {first.revision, second.revision}
    with first.download([list(first.ranks[0].files)]) as downloading:
        assert downloading.path(next(iter(first.ranks[0].files))).is_file()
    del first, downloading
    open_source(ADDRESS)
    assert [p.name for p in commits.iterdir()] == [second.revision]


def test_leftovers_of_another_run_count_too(
    hub: LoopbackHub, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that got far was killed; the next one, for another result, begins with the first files again."""
    plan = planned()
    files = plan.source.downloader.files  # type: ignore[union-attr]
    files.mkdir()
    for name in SHARDS:
        shutil.copy(SOURCE / name, files)
    (files / "unknown.safetensors").write_bytes(b"left")
    with watched(cache, monkeypatch) as on_disk:
        run_with(plan, tmp_path / "out")
    assert max(on_disk) <= least_budget(plan)


def test_what_a_killed_process_left_among_the_headers_is_not_carried_along(
    hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a small file."""
    hub.put(NAME, {"tokenizer.model": b"\0" * 100_000})

    class Killed(BaseException):
        pass

    class Dying(Lying):
        @contextmanager
        def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
            with super().read(listing, name, start, stop) as chunks:
                yield self.two(chunks) if name == "tokenizer.model" else chunks

        def two(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
            yield next(chunks)
            yield next(chunks)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)  # the next process has another number
        with pytest.raises(Killed):
            open_lying(Dying())
    source = open_source(ADDRESS)
    assert sorted(p.name for p in source.extra_files) == ["generation_config.json", "tokenizer.model"]
    assert {p.name for p in source.folder.iterdir()} == {p.name for p in SOURCE.iterdir()} | {"tokenizer.model"}
    assert not (source.folder.parent / "incoming").exists()


def test_a_result_is_verified_against_the_hub(hub: LoopbackHub, command: Command, tmp_path: Path, cache: Path) -> None:
    run_plan(planned(), tmp_path / "out")
    hub.requests.clear()
    code, out, _ = command("verify", tmp_path / "out", "--against", ADDRESS, "--full")
    assert code == 0
    assert f"quantized: error recomputed from {ADDRESS}, it is the reported one\n" in out
    assert "not compared" not in out
    assert {name for name, r in weights_asked(hub) if not r} == set(SHARDS)
    assert not files_of(cache)

    hub.put("org/other", GOLDEN / "moe_mtp/paddle")
    with pytest.raises(ErnieQuantError):
        verify(tmp_path / "out", against="hf://org/other")


def test_a_token_that_is_none_is_not_shown(
    hub: LoopbackHub, command: Command, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("hf_Wrong", "se cret", "sécret", "secret\x01"):
        monkeypatch.setenv("HF_TOKEN", token)
        err = refusal(command, "inspect", ADDRESS)
        assert not any(part in err for part in ("Wrong", "cret", "\x01"))
    assert waits == []
