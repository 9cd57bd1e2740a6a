"""A hub as a source: the bytes of the folder, a few files at a time, whatever the network does."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.hub import LoopbackHub
from helpers.hubs import (
    ADDRESS,
    ALL_BYTES,
    CHUNK,
    NAME,
    SHARDS,
    SOURCE,
    files_of,
    least_budget,
    planned,
    real_sleep,
    run_with,
    same_result,
    watched,
    weights_asked,
)
from helpers.models import tensors
from helpers.synthetic import golden, write_ranks, write_safetensors

from ernie_quant.check.verify import verify
from ernie_quant.errors import RetryError
from ernie_quant.hubs import Listing, RemoteFile
from ernie_quant.hubs._patience import LONGEST_WAIT
from ernie_quant.names import natural
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import download, fetch, open_source


class DeadLockError(Exception):
    pass


def in_time(work: Callable[[], Any], seconds: float = 60) -> Any:
    """What `work` returns, unless it hangs."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeadLockError
    return found[0]


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 40_000, 10**6], ids=["the least", "a little more", "plenty"])
def test_the_hub_gives_the_bytes_of_the_folder_within_the_budget(
    ahead: int, hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last output file need the same file: at the least budget it stays while the others come and go."""
    plan = planned()
    needs = [{path.name for path in shard.needs} for shard in plan.shards]
    assert needs[0] & needs[-1]
    budget = least_budget(plan) + ahead
    with watched(cache, monkeypatch) as on_disk:
        in_time(lambda: run_plan(plan, tmp_path / "out", disk_budget=budget))
    assert same_result(tmp_path / "out", local)
    assert max((SOURCE / name).stat().st_size for name in SHARDS) < max(on_disk) <= budget
    assert not list(cache.rglob("files"))


def test_without_a_budget_one_file_more_than_needed_lies_on_disk(
    hub: LoopbackHub, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve files in the order of their use: two thirds of their bytes never lie there together."""
    config, weights = golden("moe", "pt")
    order = sorted(weights, key=natural)
    for number in range(12):
        part = order[number * len(order) // 12 : (number + 1) * len(order) // 12]
        write_safetensors(tmp_path / f"model-{number + 1:05}-of-00012.safetensors", {name: weights[name] for name in part})
    hub.put("org/twelve", {p.name: p for p in tmp_path.glob("*.safetensors")} | {"config.json": json.dumps(config).encode()})
    plan = planned("hf://org/twelve", shard_bytes=20_000)
    largest = max(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    with watched(cache, monkeypatch) as on_disk:
        run_plan(plan, tmp_path / "out")
    assert max(on_disk) <= least_budget(plan) + largest
    assert largest < max(on_disk) < ALL_BYTES * 2 / 3


def test_manifest_and_card_say_where_it_came_from(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.repo(NAME).branches["main"]
    run_plan(planned(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/ernie-quant.json").read_text())
    assert manifest["source_address"] == ADDRESS
    assert manifest["source_name"] == "ERNIE-tiny-Paddle"
    assert manifest["source"]["revision"] == commit
    card = (tmp_path / "out/README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    assert f"- source: {ADDRESS}, commit {commit}" in card


def test_mtp_folders_and_ranks_are_read_as_in_a_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    ranks = write_ranks(tmp_path / "ranks", "moe", 2)
    hub.put("org/ranks", ranks)
    for source in (ranks, "hf://org/ranks"):
        run_plan(make_plan(open_source(source), runtime="vllm"), tmp_path / f"out-{len(str(source))}")
    one, other = tmp_path.glob("out-*")
    assert tensors(one).keys() == tensors(other).keys()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_same_is_carried_along_as_from_a_folder(hub: LoopbackHub, tmp_path: Path, cache: Path) -> None:
    model = {"vocab.txt": b"", "tokenizer.model": b"model", "additional_chat_templates/tool.jinja": b"x"}
    others = {"model.gguf": b"gguf", "figures/a.png": b"png", "figures/b.txt": b"x", "core.1": b"\0", "pytorch_model.bin": b"bin"}
    source = Path(shutil.copytree(SOURCE, tmp_path / "src"))
    for name, data in {**model, **others}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    hub.put(NAME, {**model, **others})
    here, there = (make_plan(open_source(place), runtime="vllm") for place in (source, ADDRESS))
    used = here.notes[0].partition(";")[0]
    others = f"{used}; also there, and not read: pytorch_model.bin, model.gguf"
    unread = "not read and not carried along: model.gguf, pytorch_model.bin"
    assert there.notes[:3] == here.notes[:3] == (others, unread, "not carried along: core.1, figures/; --copy PATTERN takes them")
    assert set(there.copied) == set(here.copied) == {"generation_config.json", *model}
    assert not {"core.1", "a.png"} & {p.name for p in cache.rglob("*")}  # what is not carried along is not fetched either


def test_a_name_of_255_bytes_comes_from_a_hub_too(hub: LoopbackHub, tmp_path: Path) -> None:
    name = "模型" * 42 + ".md"
    hub.put(NAME, {name: b"text"})
    run_plan(make_plan(open_source(ADDRESS), runtime="vllm"), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"text"


def test_what_a_pattern_asks_for_is_fetched_before_the_work(hub: LoopbackHub, tmp_path: Path, cache: Path) -> None:
    hub.put(NAME, {"figures/a.png": b"png", "figures/b.txt": b"text", "core.1": b"\0"})
    plan = make_plan(open_source(ADDRESS), runtime="vllm", copy=["figures/*.png", "core.?"])
    assert plan.notes[-1] == "not carried along: figures/; --copy PATTERN takes them"
    run_plan(plan, tmp_path / "out")
    assert (tmp_path / "out/figures/a.png").read_bytes() == b"png"
    assert (tmp_path / "out/core.1").read_bytes() == b"\0"
    assert not (tmp_path / "out/figures/b.txt").exists()
    assert verify(tmp_path / "out").files


@pytest.mark.parametrize("arguments", [("inspect",), ("plan",), ("wint4", "out", "--group-size", "32", "--dry-run")])
def test_looking_reads_headers_only(
    arguments: tuple[str, ...], hub: LoopbackHub, command: Command, short_heads: None, cache: Path
) -> None:
    verb, *rest = arguments
    code, out, err = command(verb, ADDRESS, *rest)
    assert (code, err) == (0, "")
    assert out
    asked = weights_asked(hub)
    assert {name for name, _ in asked} == set(SHARDS)
    stops = [int(r.removeprefix("bytes=0-")) + 1 for _, r in asked]  # all from the first byte on
    assert sum(stops) < ALL_BYTES / 10
    assert not files_of(cache)
    on_disk = sum(p.stat().st_blocks * 512 for p in cache.rglob("*.safetensors"))
    assert on_disk < ALL_BYTES / 4  # the files of the headers are sparse

    hub.requests.clear()
    command(verb, ADDRESS, *rest)
    assert [r.path for r in hub.requests] == [f"/api/models/{NAME}"]  # the second look asks for the commit only


def test_a_budget_that_is_too_small_is_refused_before_anything_is_fetched(
    hub: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    least = least_budget(planned())
    hub.requests.clear()
    how = ("--group-size", "32", "--max-shard-size", "60000", "-q")
    code, _, err = command("wint4", ADDRESS, tmp_path / "out", *how, "--disk-budget", least - 1)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{least} bytes" in err
    assert f"budget of {least - 1} bytes" in err
    assert not weights_asked(hub)


# --- a network that fails --------------------------------------------------------------------------------------------


def test_wrong_bytes_of_the_right_size_are_fetched_again(
    hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, waits: list[float]
) -> None:
    plan = planned()
    fault = hub.corrupt(path="^/lfs/.*-00002-of", times=2)
    hub.requests.clear()
    run_with(plan, tmp_path / "out")
    assert same_result(tmp_path / "out", local)
    assert fault.struck == 2
    assert weights_asked(hub).count((SHARDS[1], "")) == 3


def test_three_times_wrong_bytes_are_enough(hub: LoopbackHub, tmp_path: Path, cache: Path, waits: list[float]) -> None:
    plan = planned()
    hub.corrupt(path="^/lfs/.*-00002-of", times=None)
    sha256 = hashlib.sha256((SOURCE / SHARDS[1]).read_bytes()).hexdigest()
    with pytest.raises(RetryError, match=rf"{SHARDS[1]}: arrived 3 times with another hash than the hub's {sha256}"):
        run_with(plan, tmp_path / "out")
    assert SHARDS[1] not in {p.name.removesuffix(".partial") for p in files_of(cache)}


@pytest.mark.parametrize("reset", [False, True], ids=["end of file", "reset"])
def test_a_dropped_connection_goes_on_where_it_stopped(
    reset: bool, hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, waits: list[float]
) -> None:
    plan = planned()
    fault = hub.drop(path="^/lfs/.*-00002-of", after_bytes=40_000, reset=reset, times=2)
    hub.requests.clear()
    run_with(plan, tmp_path / "out")
    assert same_result(tmp_path / "out", local)
    first, second, third = [r for name, r in weights_asked(hub) if name == SHARDS[1]]
    starts = [int(r.removeprefix("bytes=").removesuffix("-") or 0) for r in (first, second, third)]
    assert fault.struck == 2
    assert len(waits) == 2
    assert starts == sorted(starts)
    if not reset:  # what has arrived may be lost when a connection is reset
        assert first == ""
        assert 40_000 - CHUNK < starts[1] <= 40_000
        assert 80_000 - 2 * CHUNK < starts[2] <= 80_000


def test_a_part_of_a_file_is_not_fetched_again_by_the_next_run(
    hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, cache: Path
) -> None:
    """The first run ends in the middle of a download, as Ctrl-C would end it."""
    plan = planned()
    hub.slow(path="^/lfs/.*-00001-of", bytes_per_second=200_000, times=1)

    def progress(done: int) -> None:
        for _ in range(500 if done else 0):
            if any(p.name == SHARDS[0] + ".partial" and p.stat().st_size > 20_000 for p in files_of(cache)):
                raise KeyboardInterrupt
            real_sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", progress=progress)
    left = {p.name: p.stat().st_size for p in files_of(cache)}
    part = left.pop(SHARDS[0] + ".partial")
    hub.requests.clear()
    run_plan(planned(), tmp_path / "out")
    asked = weights_asked(hub)
    assert (SHARDS[0], f"bytes={part}-") in asked
    assert left  # whole files need not come again either
    assert {name for name, _ in asked} == set(SHARDS) - left.keys()
    assert same_result(tmp_path / "out", local)


def test_who_waits_for_a_file_waits_no_longer_than_the_run(hub: LoopbackHub) -> None:
    source = open_source(ADDRESS)
    files = list(source.ranks[0].files)
    hub.slow(path="^/lfs/", bytes_per_second=10_000)  # a minute for all of them
    ended: list[type[BaseException]] = []

    def wait(downloading: Any) -> None:
        try:
            downloading.path(files[-1])
        except download.Stopped as stopped:
            ended.append(type(stopped))

    with source.download([files]) as downloading:
        thread = threading.Thread(target=wait, args=(downloading,), daemon=True)
        thread.start()
    thread.join(10)
    assert ended == [download.Stopped]


def test_who_hashes_what_is_there_already_may_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of 5 GB takes a while; nobody asks the hub before that."""
    monkeypatch.setattr(fetch, "CHUNK", CHUNK)
    (tmp_path / "w.partial").write_bytes(b"\0" * 3 * CHUNK)
    file, listing = RemoteFile("w", 4 * CHUNK, "0" * 64, ""), Listing("hf://a/b", "a/b", "0" * 40, {})
    asked: list[float] = []

    def pause(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 2:
            raise download.Stopped

    with pytest.raises(download.Stopped):
        fetch.fetch(object(), listing, file, tmp_path / "w", pause)  # type: ignore[arg-type] # no hub
    assert (tmp_path / "w.partial").stat().st_size == 3 * CHUNK


def test_a_part_that_is_wrong_or_too_long_begins_anew(
    hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, waits: list[float]
) -> None:
    plan = planned()
    files = plan.source.downloader.files  # type: ignore[union-attr]
    files.mkdir()
    (files / f"{SHARDS[4]}.partial").write_bytes(b"\0" * 1000)
    (files / f"{SHARDS[0]}.partial").write_bytes(b"\0" * 10**6)
    hub.requests.clear()
    run_plan(plan, tmp_path / "out")
    assert same_result(tmp_path / "out", local)
    assert [r for name, r in weights_asked(hub) if name == SHARDS[4]] == ["bytes=1000-", ""]
    assert [r for name, r in weights_asked(hub) if name == SHARDS[0]] == [""]


def test_the_hub_may_ask_for_patience(hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, waits: list[float]) -> None:
    hub.fail(path=f"^/api/models/{NAME}", status=429, headers={"Retry-After": "7"})
    hub.fail(path="^/lfs/.*-00003-of", status=503)
    plan = planned()
    hub.fail(path="^/lfs/.*-00002-of", status=429, headers={"Retry-After": "86400"})
    hub.fail(path="^/lfs/.*-00004-of", status=None)
    run_with(plan, tmp_path / "out")
    assert same_result(tmp_path / "out", local)
    assert waits[0] == 7
    assert LONGEST_WAIT in waits  # a day is more than it is worth
    assert all(0.5 <= wait <= 1 for wait in waits if wait not in (7, LONGEST_WAIT))
    assert len(waits) == 4


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("inf", LONGEST_WAIT, LONGEST_WAIT), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5, 1), ("-5", 0, 0), ("nan", 0, 0)],
)
def test_odd_times_to_wait(said: str, least: float, most: float, hub: LoopbackHub, waits: list[float]) -> None:
    hub.fail(path="^/lfs/.*-00003-of", status=429, headers={"Retry-After": said})
    open_source(ADDRESS)
    assert least <= sum(waits) <= most


def test_headers_come_through_broken_connections(hub: LoopbackHub, waits: list[float]) -> None:
    hub.drop(path="^/lfs/.*-0000[24]-of", after_bytes=5000, times=3)
    hub.drop(path="/config.json", after_bytes=100)
    assert len(open_source(ADDRESS).refs) == len(open_source(SOURCE).refs)
    assert len(waits) == 4


def test_patience_ends(hub: LoopbackHub, command: Command, tmp_path: Path, waits: list[float]) -> None:
    hub.fail(path="^/lfs/.*-00002-of", status=503, times=None)
    code, _, err = command("inspect", ADDRESS)
    assert (code, err) == (75, f"error: {ADDRESS}: {SHARDS[1]}: the hub answers 503; tried 8 times\n")
    assert 1 + 2 + 4 + 8 + 16 + 30 + 30 == 91 > sum(waits) > 91 / 2


def test_a_hub_that_is_not_there_is_worth_retrying(
    hub: LoopbackHub, command: Command, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, _, err = command("inspect", ADDRESS)
    assert (code, err.count("\n")) == (75, 1)
    assert "tried 8 times" in err


def test_a_full_disk_is_not_taken_for_a_broken_network(
    hub: LoopbackHub, command: Command, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return Full(path, mode) if str(path).endswith("-00002-of-00005.safetensors.partial") else open(path, mode, **options)

    monkeypatch.setattr("ernie_quant.sources.fetch.open", opened, raising=False)
    code, _, err = command("wint4", ADDRESS, tmp_path / "out", "--group-size", "32", "-q")
    assert (code, err.count("\n")) == (75, 1), err
    assert f"files/{SHARDS[1]}: cannot be written: No space left on device; the same command goes on" in err
    assert waits == []


def test_an_index_left_over_on_a_hub_is_passed_over_as_in_a_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00020.safetensors"}}
    hub.put(NAME, {"model.safetensors.index.json": json.dumps(index).encode()})
    checkpoint = open_source(ADDRESS)
    left = "model.safetensors.index.json (1 file(s), of which none is there)"
    assert checkpoint.notes == (f"weights are read from {SHARDS[0]}; also there, and not read: {left}",)
    assert checkpoint.refs.keys() == open_source(SOURCE).refs.keys()
