"""Publishing: one commit with what is here and nothing else, in the repository that was asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, NAME, planned, uploads, writes
from helpers.publishing import REPO, commits, hashes, on_hub, publish_to, weights

from ernie_quant.errors import HubError, OutputError, VerifyError
from ernie_quant.hubs.hf.publish import HuggingFacePublisher
from ernie_quant.run.whole import run_plan

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures", "waits")]


# --- what is published -----------------------------------------------------------------------------------------------


def test_the_first_publish_makes_a_private_repository_with_our_files(hub: LoopbackHub, out: Path) -> None:
    found = publish_to(out)
    assert found.status == "published"
    assert hub.repo(REPO).private
    assert on_hub(hub) == hashes(out)
    assert found.uploaded == len(on_hub(hub))
    assert found.bytes_uploaded == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert [c.title.partition(",")[0] for c in hub.repo(REPO).commits()] == ["wint4 of paddle", "initial commit"]
    assert hub.repo(REPO).branches["main"] == found.commit
    assert len(commits(hub)) == 1


def test_the_card_is_written_under_the_name_of_the_repository(hub: LoopbackHub, out: Path) -> None:
    assert not (out / "README.md").read_text().count(REPO)
    publish_to(out)
    card = hub.repo(REPO).read("README.md").decode()
    assert "# tiny-wint4\n" in card
    assert f"vllm serve {REPO}" in card
    manifest = json.loads(hub.repo(REPO).read("ernie-quant.json"))
    assert manifest["files"]["README.md"]["sha256"] == hashlib.sha256(card.encode()).hexdigest()
    assert f"{manifest['files']['README.md']['sha256']}  README.md\n" in hub.repo(REPO).read("SHA256SUMS").decode()


def test_a_second_publish_is_up_to_date_and_writes_nothing(hub: LoopbackHub, out: Path) -> None:
    first = publish_to(out, tag="v1")
    hub.requests.clear()
    second = publish_to(out, tag="v1")
    assert (second.status, second.commit, second.uploaded, second.bytes_uploaded) == ("up-to-date", first.commit, 0, 0)
    assert writes(hub) == []


def test_a_changed_result_replaces_and_drops_in_one_commit(hub: LoopbackHub, out: Path, tmp_path: Path) -> None:
    from helpers.hubs import SOURCE

    publish_to(out)
    hub.put(REPO, {"somebody/notes.txt": b"notes"})
    larger = tmp_path / "larger"
    run_plan(planned(SOURCE, shard_bytes=100_000), larger)
    found = publish_to(larger)
    assert on_hub(hub) == hashes(larger) | {"somebody/notes.txt": hashlib.sha256(b"notes").hexdigest()}
    assert found.dropped == len({p.name for p in weights(out)} - {p.name for p in weights(larger)}) > 0
    assert len(commits(hub)) == 2


def test_what_is_published_can_be_downloaded_and_verified(hub: LoopbackHub, out: Path, tmp_path: Path, command: Command) -> None:
    from huggingface_hub import snapshot_download

    publish_to(out)
    there = snapshot_download(REPO, local_dir=tmp_path / "there")
    code, said, _ = command("verify", there, "--against", ADDRESS, "--full")
    assert code == 0
    assert "verified" in said
    sums = [line.split("  ") for line in (tmp_path / "there/SHA256SUMS").read_text().splitlines()]
    assert {name: digest for digest, name in sums}.items() <= hashes(Path(there)).items()


def test_the_command_says_what_it_did(hub: LoopbackHub, out: Path, command: Command) -> None:
    code, said, err = command("publish", out, REPO, "--tag", "v1", "-q")
    commit = hub.repo(REPO).branches["main"]
    assert (code, err) == (0, "")
    assert said == f"{REPO}: published: {len(on_hub(hub))} files, 0.00 GB uploaded; commit {commit}, tag v1\n"
    code, said, _ = command("publish", out, f"hf://{REPO}", "--json")
    assert json.loads(said)["status"] == "up-to-date"


# --- which repository ------------------------------------------------------------------------------------------------


def test_public_only_when_asked_for(hub: LoopbackHub, out: Path, command: Command) -> None:
    assert command("publish", out, "me/one", "-q")[0] == 0
    assert command("publish", out, "me/two", "--public", "-q")[0] == 0
    assert command("publish", out, "me/three", "--private", "-q")[0] == 0
    assert {name: hub.repo(f"me/{name}").private for name in ("one", "two", "three")} == {
        "one": True,
        "two": False,
        "three": True,
    }


@pytest.mark.parametrize("private", [False, True])
def test_the_visibility_of_a_repository_is_never_changed(private: bool, hub: LoopbackHub, out: Path, command: Command) -> None:
    hub.put(REPO, {"README.md": b"to come"}, private=private)
    asked, other = ("--private", "--public") if private else ("--public", "--private")
    code, _, err = command("publish", out, REPO, other, "-q")
    is_ = "private" if private else "public"
    assert (code, err) == (
        1,
        f"error: {REPO}: is {is_}, and {other} was asked for; change it on the hub, or leave {other} out\n",
    )
    assert writes(hub) == []
    assert command("publish", out, REPO, "-q")[0] == 0
    assert command("publish", out, REPO, asked, "-q")[0] == 0
    assert hub.repo(REPO).private is private
    assert not [r for r in hub.requests if r.path.endswith("/settings")]


def test_a_repository_of_others_is_left_alone(hub: LoopbackHub, out: Path) -> None:
    hub.put(REPO, {"README.md": b"mine", "model.safetensors": b"\0" * 100})
    with pytest.raises(HubError, match=r"holds model\.safetensors and was not made by ernie-quant"):
        publish_to(out)
    hub.put("me/odd", {"ernie-quant.json": b"[1, 2]", "model.safetensors": b"\0" * 100})
    with pytest.raises(HubError, match=r"its ernie-quant\.json cannot be read"):
        publish_to(out, "me/odd")
    assert not commits(hub)


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "", "me/ti ny", "me/-x"])
def test_a_repository_has_an_owner_and_a_plain_name(repo: str, hub: LoopbackHub, out: Path, command: Command) -> None:
    code, _, err = command("publish", out, repo, "-q")
    assert (code, err.count("\n")) == (1, 1)
    assert writes(hub) == []
    assert set(hub.store.repos) == {NAME}


def test_a_new_branch_leaves_main_alone(hub: LoopbackHub, out: Path) -> None:
    hub.put(REPO, {"README.md": b"main"})
    before = hub.repo(REPO).branches["main"]
    found = publish_to(out, revision="next")
    assert hub.repo(REPO).branches == {"main": before, "next": found.commit}
    assert on_hub(hub, revision="next") == hashes(out)
    assert publish_to(out, revision="next").status == "up-to-date"


def test_a_pull_request_leaves_main_alone_too(hub: LoopbackHub, out: Path) -> None:
    before = hub.put(REPO, {"README.md": b"main"})
    found = publish_to(out, pr=True, tag="v1")
    assert (found.status, found.commit, found.tag) == ("published", "refs/pr/1", "")
    assert hub.repo(REPO).branches["main"] == before
    assert on_hub(hub, revision="refs/pr/1") == hashes(out)
    assert hub.repo(REPO).tags == {}


def test_a_tag_stays_where_it_is(hub: LoopbackHub, out: Path, tmp_path: Path) -> None:
    from helpers.hubs import SOURCE

    first = publish_to(out)
    assert publish_to(out, tag="v1").status == "up-to-date"  # a tag can be added later
    assert publish_to(out, tag="v1").tag == "v1"
    assert hub.repo(REPO).tags == {"v1": first.commit}
    other = tmp_path / "other"
    run_plan(planned(SOURCE, shard_bytes=100_000), other)
    hub.requests.clear()
    with pytest.raises(HubError, match=rf"the tag v1 names commit {first.commit[:12]} already"):
        publish_to(other, tag="v1")
    assert writes(hub) == []
    assert publish_to(other, tag="v2").commit == hub.repo(REPO).tags["v2"] != first.commit


# --- what is not what it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_file_that_is_not_that_of_the_manifest_is_not_published(size: str, hub: LoopbackHub, out: Path) -> None:
    victim = weights(out)[2]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data) + b"\0" * (size == "other"))
    with pytest.raises((HubError, OutputError), match=victim.name):
        publish_to(out)
    assert not commits(hub)
    (out / "ernie-quant.json").unlink()
    with pytest.raises(OutputError, match=r"has no ernie-quant\.json"):
        publish_to(out)


def test_a_missing_file_is_not_published(hub: LoopbackHub, out: Path) -> None:
    weights(out)[1].unlink()
    with pytest.raises(Exception, match=f"{weights(out)[1].name[:10]}.*is not there"):
        publish_to(out)
    assert writes(hub) == []


def test_what_the_hub_reports_afterwards_is_compared(hub: LoopbackHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that loses a file, or has another one in its place."""
    real = HuggingFacePublisher.head

    def head(self: HuggingFacePublisher, repo: str, revision: str) -> Any:
        found = real(self, repo, revision)
        if found and "SHA256SUMS" in found.files:
            del found.files["SHA256SUMS"]  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(HuggingFacePublisher, "head", head)
    with pytest.raises(VerifyError, match="SHA256SUMS: is not there"):
        publish_to(out)
