"""A hub as a source: the bytes of the folder, a few files at a time, every one checked, whatever the network does."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, CHUNK, INT4, NAME, SOURCE, contents, files_of, least_budget, planned, real_sleep, weights_asked
from helpers.models import GOLDEN, tensors
from helpers.synthetic import golden, write_ranks, write_raw_safetensors, write_safetensors

from ernie_quant.check.verify import verify
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import CheckpointError, ErnieQuantError, HubError, RetryError
from ernie_quant.hubs import Listing, RemoteFile, parse
from ernie_quant.hubs._patience import LONGEST_WAIT
from ernie_quant.hubs.hf.read import HuggingFace
from ernie_quant.names import natural
from ernie_quant.plan.make import make_plan
from ernie_quant.plan.steps import Plan
from ernie_quant.run.whole import RunResult, run_plan
from ernie_quant.sources import download, open_source
from ernie_quant.sources import hub as sources_hub

pytest_plugins = ["helpers.hubs"]

SHARDS = sorted(p.name for p in SOURCE.glob("*.safetensors"))
ALL_BYTES = sum((SOURCE / name).stat().st_size for name in SHARDS)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The result that is made from the folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    run_plan(planned(SOURCE), out)
    return contents(out)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


TELLING_THE_SOURCE = {"README.md", "SHA256SUMS", "ernie-quant.json"}


def same_result(out: Path, local: dict[str, bytes]) -> bool:
    """Every file but those that say where the source was."""
    found = contents(out)
    return found.keys() == local.keys() and all(found[n] == local[n] for n in found.keys() - TELLING_THE_SOURCE)


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


@contextmanager
def watched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that lie in the cache after every piece of a download and every slab."""
    found, before = [0], download.HubDownload._pause

    def look(self: download.HubDownload, seconds: float) -> None:
        sizes = []
        for path in files_of(cache):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # renamed while we looked
                continue
        found.append(sum(sizes))
        before(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(download.HubDownload, "_pause", look)
        yield found


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


def test_what_is_left_behind_is_said_as_for_a_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    read = {"empty.txt": b"", "tokenizer.model": b"model"}
    files = read | {"model.gguf": b"gguf", "figures/a.png": b"png", "pytorch_model.bin": b"bin"}
    source = Path(shutil.copytree(SOURCE, tmp_path / "src"))
    for name, data in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    hub.put(NAME, files)
    here, there = open_source(source), open_source(ADDRESS)
    assert there.notes == here.notes == ("not read and not carried along: figures/, model.gguf, pytorch_model.bin",)
    assert [p.name for p in there.extra_files] == [p.name for p in here.extra_files] == sorted({"generation_config.json", *read})


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


def run_with(plan: Plan, out: Path, **options: Any) -> RunResult:
    return run_plan(plan, out, disk_budget=least_budget(plan), workers=1, **options)


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


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(command: Command, *arguments: object) -> str:
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    return err


def test_what_is_not_there_is_one_line(
    hub: LoopbackHub, command: Command, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    assert "there is no such repository" in refusal(command, "inspect", "hf://baidu/none")
    assert "there is no such revision" in refusal(command, "inspect", f"{ADDRESS}@none")
    hub.put("org/bins", {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"bin"})
    assert "holds only .bin, which cannot be read by range" in refusal(command, "inspect", "hf://org/bins")
    hub.put("org/none", {"config.json": b"{}"})
    assert "holds no weights" in refusal(command, "inspect", "hf://org/none")
    hub.repo(NAME).gated = "manual"
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    assert "is gated: accept its terms on the hub" in refusal(command, "inspect", ADDRESS)
    hub.repo(NAME).private = True
    assert "there is no such repository, or the token may not see it" in refusal(command, "inspect", ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert "HF_HUB_OFFLINE is set" in refusal(command, "inspect", ADDRESS)
    assert waits == []  # none of that passes with time


@pytest.mark.parametrize("address", ["hf://tiny", "hf://a/b/c", "hf://../b", "hf://a/b@", "hf://a/b@x@y", "hf://a/b c", "hf://"])
def test_an_address_is_org_name_and_revision(address: str) -> None:
    with pytest.raises(CheckpointError, match="is not SCHEME://ORG/NAME or SCHEME://ORG/NAME@REVISION"):
        parse(address)


def test_another_hub_is_not_known(command: Command) -> None:
    assert refusal(command, "inspect", "ftp://a/b").startswith("error: ftp://a/b: there is no ftp://; there is ")


class Lying(HuggingFace):
    """The hub, but for a listing or bytes that a stranger has thought of."""

    def __init__(self, files: dict[str, int] | None = None, spoil: Callable[[str, bytes], bytes] | None = None) -> None:
        super().__init__()
        self.files, self.spoil = files or {}, spoil

    def listing(self, repo: str, revision: str) -> Listing:
        found = super().listing(repo, revision)
        more = {name: RemoteFile(name, nbytes, "00" * 32) for name, nbytes in self.files.items()}
        return replace(found, files={**found.files, **more})

    @contextmanager
    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
        with super().read(listing, name, start, stop) as chunks:
            ranged = stop is not None and name.endswith(".safetensors")
            yield iter([self.spoil(name, b"".join(chunks))]) if self.spoil and ranged else chunks


def open_lying(hub: Lying) -> Checkpoint:
    return sources_hub.open_remote(hub, ADDRESS, NAME, "")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x",
        "C:\\x",
        "C:x",
        "a\\..\\b",
        "mtp/../../x",
        "./config.json",
        "mtp//x",
        "a\nb",
        "..",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(name: str, hub: LoopbackHub, tmp_path: Path, cache: Path) -> None:
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="which is not a plain name"):
        open_lying(Lying({name: 10}))
    assert len(hub.requests) == 1  # the listing
    assert not list(cache.rglob("*")) if cache.exists() else True


def test_a_config_that_claims_a_gigabyte_is_not_asked_for(hub: LoopbackHub) -> None:
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=r"config\.json: 1000000000 bytes are too many for what is no weight file"):
        open_lying(Lying({"config.json": 10**9}))
    assert len(hub.requests) == 1


def test_a_header_that_claims_to_be_huge_is_not_asked_for(hub: LoopbackHub, tmp_path: Path, short_heads: None) -> None:
    for length in (1 << 62, 500 << 20, 30_000):
        data = write_raw_safetensors(tmp_path / "x", b"{" * 20_000, length=length).read_bytes()
        hub.put("org/huge", {"config.json": SOURCE / "config.json", "model.safetensors": data})
        hub.requests.clear()
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_source("hf://org/huge")
        assert weights_asked(hub) == [("model.safetensors", "bytes=0-999")]


def test_an_empty_weight_file_is_refused(hub: LoopbackHub) -> None:
    hub.put("org/empty", {"config.json": SOURCE / "config.json", "model.safetensors": b""})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_source("hf://org/empty")


def test_a_header_that_was_damaged_on_its_way_is_noticed_and_read_again(
    hub: LoopbackHub, local: dict[str, bytes], tmp_path: Path, short_heads: None
) -> None:
    """Ranges have no hash. Here two tensors of equal shape change places, and the header is as valid as before."""

    def swap(name: str, data: bytes) -> bytes:
        if name != SHARDS[2] or len(data) == 1000:
            return data
        table = json.loads(data[8:])
        one, other = next((a, b) for a, b in combinations(table, 2) if table[a].get("shape") == table[b].get("shape"))
        table[one], table[other] = table[other], table[one]
        return data[:8] + json.dumps(table, separators=(",", ":")).encode().ljust(len(data) - 8)

    plan = make_plan(open_lying(Lying(spoil=swap)), runtime="vllm", recipe=INT4, shard_bytes=60_000)
    with pytest.raises(RetryError, match=rf"{SHARDS[2]}: its header is not the one that was planned with; run again"):
        run_plan(plan, tmp_path / "out")
    run_plan(planned(), tmp_path / "out", restart=True)
    assert same_result(tmp_path / "out", local)


def test_a_header_that_was_damaged_beyond_reading_is_read_again_too(hub: LoopbackHub, short_heads: None) -> None:
    fault = hub.corrupt(path="^/lfs/.*-00003-of", times=2)  # the first 1000 bytes, and all of the header
    with pytest.raises(CheckpointError, match=SHARDS[2]):
        open_source(ADDRESS)
    assert fault.struck == 2
    assert len(open_source(ADDRESS).refs) == len(open_source(SOURCE).refs)


def test_a_file_that_never_ends_does_not_fill_the_disk(hub: LoopbackHub, tmp_path: Path, waits: list[float]) -> None:
    class Endless(Lying):
        @contextmanager
        def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
            with super().read(listing, name, start, stop) as chunks:
                yield self.more(chunks) if stop is None and name == SHARDS[1] else chunks

        def more(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
            yield from chunks
            for _ in range(1000):
                yield b"\0" * 10**6
            pytest.fail("a gigabyte was taken")

    plan = make_plan(open_lying(Endless()), runtime="vllm", recipe=INT4)
    with pytest.raises(RetryError, match="arrived 3 times"):
        run_plan(plan, tmp_path / "out")


# --- one commit, one cache -------------------------------------------------------------------------------------------


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
    assert f"Every tensor agrees with {ADDRESS}" in out
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


# --- addresses -------------------------------------------------------------------------------------------------------


def test_a_hub_that_nobody_knows_is_named_with_those_that_are_known() -> None:
    with pytest.raises(CheckpointError, match=r"there is no s3://; there is aistudio://, hf://, modelscope://"):
        open_source("s3://org/name")


# --- mirrors ---------------------------------------------------------------------------------------------------------


def without_hashes(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """As mirrors answer that leave them out of a model's description, or of the tree too."""
    import huggingface_hub

    for method in methods:
        original = getattr(huggingface_hub.HfApi, method)

        def bare(self: object, *args: object, original: Any = original, **kwargs: object) -> Any:
            found = original(self, *args, **kwargs)
            found = found if hasattr(found, "siblings") else list(found)
            for file in found if isinstance(found, list) else found.siblings:
                file.lfs = file.blob_id = None
            return found

        monkeypatch.setattr(huggingface_hub.HfApi, method, bare)


def test_a_mirror_that_leaves_hashes_out_of_the_description_is_asked_for_the_tree(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = HuggingFace(hub.endpoint, hub.token)
    whole = reader.listing(NAME, "main")
    without_hashes(monkeypatch, "model_info")
    found = reader.listing(NAME, "main")
    assert found.commit == whole.commit
    assert {f.name: f.digest for f in found.files.values()} == {f.name: f.digest for f in whole.files.values()}


def test_what_no_hash_is_known_of_is_not_read(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    without_hashes(monkeypatch, "model_info", "list_repo_tree")
    with pytest.raises(HubError, match=f"{NAME}: the hub says no hash of .*, and what cannot be checked is not read"):
        HuggingFace(hub.endpoint, hub.token).listing(NAME, "main")
