"""A hub as a source: what lies, what is not there and what has no hash is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command, refusal
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, INT4, NAME, SHARDS, SOURCE, planned, same_result, weights_asked
from helpers.lying import Lying, open_lying
from helpers.synthetic import write_raw_safetensors

from ernie_quant.errors import CheckpointError, HubError, RetryError
from ernie_quant.hubs import Listing, parse
from ernie_quant.hubs.hf.read import HuggingFace
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_one_line(
    hub: LoopbackHub, command: Command, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    assert "there is no such repository" in refusal(command, "inspect", "hf://baidu/none")
    assert "there is no such revision" in refusal(command, "inspect", f"{ADDRESS}@none")
    hub.put("org/bins", {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"bin"})
    assert "holds only .bin, which cannot be read by range" in refusal(command, "inspect", "hf://org/bins")
    hub.put("org/ggufs", {"X-Q4_K_M.gguf": b"GGUF", "X-Q8_0.gguf": b"GGUF"})
    line = "hf://org/ggufs: holds only .gguf, which cannot be read by range; download the file, and open that"
    assert line in refusal(command, "inspect", "hf://org/ggufs")
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
    assert list(cache.rglob("*")) == []


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
