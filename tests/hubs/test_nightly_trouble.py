"""The nightly job is harmless when it is missed, doubled or killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.hub import LoopbackHub
from helpers.hubs import NAME, SOURCE, uploads, weights_asked, writes
from helpers.nights import WINT4, Night, job_file, manifest

from ernie_quant.disk import hold
from ernie_quant.errors import RetryError
from ernie_quant.hubs.hf.publish import HuggingFacePublisher
from ernie_quant.nightly import run as nightly
from ernie_quant.nightly.run import JobResult
from ernie_quant.publish import files as publishing

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures")]


def test_a_second_run_in_the_same_folder_waits_for_another_night(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    hub.requests.clear()
    with hold(work / "lock", "busy"):
        code, out, err = command("nightly", job_file(tmp_path, WINT4), "--work", work)
    assert (code, out) == (75, "")
    assert err == f"error: {work}: another run of a job is at work here\n"
    assert hub.requests == []
    with pytest.raises(RetryError, match="busy"), hold(work / "lock", "busy"), hold(work / "lock", "busy"):
        pass


def test_a_doubled_run_elsewhere_is_harmless(
    hub: LoopbackHub, night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine with the same job publishes while this one uploads."""
    real = HuggingFacePublisher.commit
    elsewhere = Night(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    results: list[JobResult] = []

    def commit(self: HuggingFacePublisher, *arguments: Any) -> str:
        monkeypatch.setattr(HuggingFacePublisher, "commit", real)
        monkeypatch.setenv("ERNIE_QUANT_CACHE", str(tmp_path / "elsewhere/cache"))
        results.append(elsewhere(WINT4))
        return real(self, *arguments)

    monkeypatch.setattr(HuggingFacePublisher, "commit", commit)
    result = night(WINT4)
    assert result.exit_code == results[0].exit_code == 0
    assert result.targets[0].commit == results[0].targets[0].commit
    assert len(hub.repo("me/tiny-wint4").commits()) == 2
    assert night.left == elsewhere.left == set()


def test_what_a_killed_run_was_deleting_is_deleted(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published, and killed in the middle of the deletion; the source moves on before the next night."""

    class Killed(BaseException):
        pass

    def rmtree(folder: Path, **options: Any) -> None:
        if folder.name == nightly.DROPPED and folder.exists():
            next(folder.rglob("*.json")).unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(nightly.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            night(WINT4)
    assert night.left == {nightly.DROPPED}
    hub.put(NAME, {"generation_config.json": b"{}"})
    assert night(WINT4).status == "published"
    assert night.left == set()


@pytest.mark.parametrize("name", ["README.md", "report.html", "SHA256SUMS", "ernie-quant.json"])
def test_a_run_that_was_killed_while_it_wrote_the_card_goes_on(
    name: str, hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publishing.write_file

    class Killed(BaseException):
        pass

    def write_file(path: Path, data: bytes) -> str:
        if path.name == name:
            path.with_name(f"{name}.partial").write_bytes(data[:100])
            raise Killed
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_file", write_file)
        with pytest.raises(Killed):
            night(WINT4)
    hub.requests.clear()
    assert night(WINT4).status == "published"
    assert weights_asked(hub) == []
    assert not [n for n in hub.repo("me/tiny-wint4").files() if n.endswith(".partial")]
    assert night.left == set()


def test_a_commit_without_its_tag_gets_it_the_next_night(hub: LoopbackHub, night: Night) -> None:
    fault = hub.fail(method="POST", path="/tag/", status=503, times=None)
    assert night(WINT4 + "tag = true\n").status == "retry"
    commit = hub.repo("me/tiny-wint4").branches["main"]
    fault.times = 0
    result = night(WINT4 + "tag = true\n")
    assert (result.status, result.targets[0].commit) == ("up-to-date", commit)
    made = manifest(hub, "me/tiny-wint4")
    assert hub.repo("me/tiny-wint4").tags == {f"{made['source']['revision'][:12]}-{made['fingerprint'][:12]}": commit}
    hub.requests.clear()
    night(WINT4 + "tag = true\n")
    assert writes(hub) == []


@pytest.mark.parametrize("damage", ["another file", "a missing file", "no manifest"])
def test_what_somebody_damaged_is_made_again(damage: str, hub: LoopbackHub, night: Night) -> None:
    night(WINT4 + "tag = true\n")
    repo = hub.repo("me/tiny-wint4")
    wanted = {n: f.sha256 for n, f in repo.files().items()}
    shard = next(name for name in wanted if name.endswith(".safetensors"))
    hub.put(
        "me/tiny-wint4",
        {
            "another file": {shard: b"\0" * repo.files()[shard].size},
            "a missing file": {shard: None},
            "no manifest": dict.fromkeys(wanted.keys() - {"README.md", ".gitattributes"}),
        }[damage],
    )
    found = night(WINT4 + "tag = true\n")
    assert found.status == "published"
    assert {n: f.sha256 for n, f in repo.files().items()} == wanted
    assert len(repo.tags) == 1
    assert night(WINT4 + "tag = true\n").status == "up-to-date"


@pytest.mark.parametrize("odd", [b"[]", b"{", b'{"files": 5}', b'{"fingerprint": "x", "files": {"a": 1}}', b"\xff"])
def test_an_odd_manifest_on_the_hub_is_no_crash(odd: bytes, hub: LoopbackHub, night: Night) -> None:
    hub.put("me/tiny-wint4", {"ernie-quant.json": odd, "model.safetensors": b"\0" * 100})
    assert night(WINT4).exit_code in (0, 1)


def test_a_public_target_is_public_and_a_private_one_stays_so(hub: LoopbackHub, night: Night) -> None:
    assert night(WINT4 + "private = false\n").exit_code == 0
    assert not hub.repo("me/tiny-wint4").private
    hub.repo("me/tiny-wint4").private = True
    hub.put(NAME, {"generation_config.json": b"{}"})
    result = night(WINT4 + "private = false\n")
    assert (result.exit_code, hub.repo("me/tiny-wint4").private) == (1, True)
    assert "is private, and --public was asked for" in result.targets[0].error


def test_a_folder_can_be_the_source(hub: LoopbackHub, night: Night) -> None:
    assert night(WINT4 + "tag = true\n", source=SOURCE).status == "published"
    assert night(WINT4 + "tag = true\n", source=SOURCE).status == "up-to-date"
    assert next(iter(hub.repo("me/tiny-wint4").tags)).startswith("local-")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_night_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """The long version: `python tests/faults/nightly.py --kills 50`."""
    from faults.nightly import all_trials

    tally = all_trials(tmp_path, kills=1, seed=4)
    assert tally.failures == []
    assert tally.kills >= 1
