"""Publishing: one commit with what is here and nothing else, whatever the hub does in between, and nothing told to strangers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import LoopbackHub
from helpers.hub.storage import Repo
from helpers.hubs import ADDRESS, NAME, contents, planned, writes

from ernie_quant import publish as publishing
from ernie_quant.errors import HubError, OutputError, RetryError, VerifyError
from ernie_quant.hubs import publisher
from ernie_quant.hubs.hf.publish import HuggingFacePublisher
from ernie_quant.publish import RACES, UPLOADED, Published, Target, publish
from ernie_quant.run.whole import run_plan

# the client uploads with a deprecated argument of its own HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
pytest_plugins = ["helpers.hubs"]

REPO = "me/tiny-wint4"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished result of four weight files."""
    from helpers.hubs import SOURCE

    out = tmp_path_factory.mktemp("finished") / "out"
    run_plan(planned(SOURCE), out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it; no pictures, which take longer than the rest."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_pictures", lambda found: {})


@pytest.fixture(autouse=True)
def nothing_waits(waits: list[float]) -> None:
    pass


def publish_to(out: Path, repo: str = REPO, **options: Any) -> Published:
    return publish(out, publisher("hf"), Target(repo, **options))


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def on_hub(hub: LoopbackHub, repo: str = REPO, revision: str = "main") -> dict[str, str]:
    files = hub.repo(repo).files(revision)
    return {name: file.sha256 for name, file in files.items() if name != ".gitattributes"}


def weights(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def commits(hub: LoopbackHub) -> list[str]:
    return [r.path for r in writes(hub) if "/commit/" in r.path]


def objects_sent(hub: LoopbackHub) -> list[str]:
    """sha256, and number of the part, of every LFS object or part of one that was uploaded."""
    return [r.path.removeprefix(f"/upload/{REPO}/") for r in hub.requests if r.method == "PUT" and r.status == 200]


def objects(sent: list[str]) -> set[str]:
    return {path.partition("/")[0] for path in sent}


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


# --- races, limits, lost answers -------------------------------------------------------------------------------------


def test_a_lost_race_is_run_again_and_nothing_is_uploaded_twice(hub: LoopbackHub, out: Path) -> None:
    fault = hub.stale_parent(times=2, files={"README.md": b"# theirs\n"})
    found = publish_to(out)
    assert (found.status, fault.struck) == ("published", 2)
    assert on_hub(hub) == hashes(out)
    sent = objects_sent(hub)
    assert len(sent) == len(set(sent))
    assert objects(sent) == {hashes(out)[p.name] for p in weights(out)}
    titles = [c.title for c in hub.repo(REPO).commits()]
    assert titles[1:3] == ["somebody else's commit 2", "somebody else's commit 1"]


def test_a_race_that_never_ends_is_given_up(hub: LoopbackHub, out: Path) -> None:
    fault = hub.stale_parent(times=None, files={"README.md": b"# theirs\n"})
    with pytest.raises(RetryError, match=f"others committed {RACES} times while this was at work"):
        publish_to(out)
    assert fault.struck == RACES
    assert set(on_hub(hub)) == {"README.md"}


def test_somebody_who_commits_something_else_meanwhile_wins(hub: LoopbackHub, out: Path) -> None:
    hub.stale_parent(files={"model.gguf": b"theirs"})
    with pytest.raises(HubError, match=r"holds model\.gguf and was not made by ernie-quant"):
        publish_to(out)


@pytest.mark.parametrize("status", [503, 500, None], ids=str)
def test_a_commit_whose_answer_is_lost_is_not_made_twice(status: int | None, hub: LoopbackHub, out: Path) -> None:
    fault = hub.fail(method="POST", path="/commit/", status=status, late=True)
    found = publish_to(out, tag="v1")
    assert fault.struck == 1
    assert found.status == "published"
    assert found.uploaded == len(on_hub(hub))
    assert on_hub(hub) == hashes(out)
    assert len(hub.repo(REPO).commits()) == 2
    assert hub.repo(REPO).tags == {"v1": found.commit}


@pytest.mark.parametrize("status", [503, 429, None], ids=str)
def test_a_commit_that_fails_is_tried_again(status: int | None, hub: LoopbackHub, out: Path, waits: list[float]) -> None:
    hub.fail(method="POST", path="/commit/", status=status, times=3, headers={"Retry-After": "11"})
    assert publish_to(out).status == "published"
    assert on_hub(hub) == hashes(out)
    assert waits.count(11.0) == (0 if status is None else 3)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "objects/batch"),
        ("PUT", "^/upload/"),
        ("POST", "/commit/"),
        ("GET", "/tree/"),
    ],
)
def test_patience_ends_and_the_next_publish_goes_on(method: str, path: str, hub: LoopbackHub, out: Path) -> None:
    fault = hub.fail(method=method, path=path, status=503, times=None)
    with pytest.raises(RetryError, match="the hub answers 503; tried 8 times"):
        publish_to(out)
    fault.times = 0
    assert publish_to(out).status == "published"
    assert on_hub(hub) == hashes(out)


def test_an_upload_that_is_cut_again_and_again_goes_on(hub: LoopbackHub, out: Path) -> None:
    fault = hub.drop(method="PUT", path="^/upload/", after_bytes=20_000, times=9)  # more often than the client tries
    assert publish_to(out).status == "published"
    assert fault.struck == 9
    assert on_hub(hub) == hashes(out)


# --- interrupted -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(count: int) -> Callable[[int], None]:
    left = count

    def progress(_: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    return progress


def test_what_was_uploaded_before_an_interruption_is_not_uploaded_again(hub: LoopbackHub, out: Path) -> None:
    order = list(json.loads((out / "ernie-quant.json").read_text())["files"])
    with pytest.raises(Killed):
        publish(out, publisher("hf"), Target(REPO), killed_after(order.index(weights(out)[1].name) + 1))
    before = objects_sent(hub)
    assert before
    assert not commits(hub)
    assert publish_to(out).status == "published"
    sent = objects_sent(hub)
    assert len(sent) == len(set(sent))
    assert objects(sent) == {hashes(out)[p.name] for p in weights(out)} > objects(before)
    assert on_hub(hub) == hashes(out)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_weights_are_deleted_as_they_are_published(after: int, hub: LoopbackHub, out: Path) -> None:
    """Also by a publish that is interrupted after so many weight files."""
    wanted = {name: digest for name, digest in hashes(out).items() if name.endswith(".safetensors")}
    left: list[int] = []

    def progress(nbytes: int) -> None:
        left.append(len(weights(out)))
        if after and left[-1] == 4 - after:
            raise Killed

    if after:
        with pytest.raises(Killed):
            publish(out, publisher("hf"), Target(REPO, delete=True), progress)
        assert len(weights(out)) == 4 - after
    assert publish_to(out, delete=True).status == "published"
    assert weights(out) == []
    assert on_hub(hub).items() >= wanted.items()
    assert on_hub(hub).items() >= {n: d for n, d in hashes(out).items() if n != UPLOADED}.items()
    assert publish_to(out, delete=True).status == "up-to-date"
    sent = objects_sent(hub)
    assert len(sent) == len(set(sent))
    assert objects(sent) == set(wanted.values())


def test_deleted_weights_survive_a_lost_race(hub: LoopbackHub, out: Path) -> None:
    wanted = {name: digest for name, digest in hashes(out).items() if name.endswith(".safetensors")}
    hub.stale_parent(times=2, files={"README.md": b"# theirs\n"})
    assert publish_to(out, delete=True).status == "published"
    assert on_hub(hub).items() >= wanted.items()


def test_weights_that_only_a_commit_carries_are_not_deleted_before_it(
    hub: LoopbackHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that takes small files for text."""
    monkeypatch.setattr(Repo, "is_lfs", lambda *_: False)
    before = hashes(out)
    assert publish_to(out, delete=True).status == "published"
    assert len(weights(out)) == 4
    assert on_hub(hub).items() >= {n: d for n, d in before.items() if n.endswith(".safetensors")}.items()


def test_what_was_uploaded_to_another_repository_is_not_forgotten_there(hub: LoopbackHub, out: Path) -> None:
    with pytest.raises(Killed):
        publish(out, publisher("hf"), Target(REPO, delete=True), killed_after(len(contents(out)) - 2))
    assert not weights(out)
    with pytest.raises(Exception, match="is not there"):
        publish_to(out, "me/another", delete=True)


# --- the token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["hf_WrongSecret", "not-a-Secret", "Sec ret"])
def test_a_wrong_token_is_one_line_without_it(
    token: str, hub: LoopbackHub, out: Path, command: Command, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, said, err = command("publish", out, REPO, "-q")
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert "Sec" not in err
    assert waits == []


def test_a_token_that_may_only_read_is_one_line(
    hub: LoopbackHub, out: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    code, _, err = command("publish", out, REPO, "-q")
    assert (code, err.count("\n")) == (1, 1)
    assert "403" in err
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = command("publish", out, REPO, "-q")
    assert (code, err.count("\n")) == (1, 1)


def test_the_token_stands_nowhere(
    hub: LoopbackHub, out: Path, command: Command, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """With everything that can be logged, and every kind of failure."""
    caplog.set_level(logging.DEBUG)
    said = []
    for number, fault in enumerate(
        (
            {"method": "POST", "path": "/commit/", "status": 400},
            {"method": "POST", "path": "/commit/", "status": 503, "times": None},
            {"method": "PUT", "path": "^/upload/", "status": 403},
            {"method": "PUT", "path": "^/upload/", "status": None, "times": None},
            {"method": "GET", "path": "/api/models/", "status": 401},
            {"method": "POST", "path": "/preupload/", "status": 429, "times": None},
        )
    ):
        struck = hub.fail(**fault)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code, *lines = command("publish", out, f"me/tiny-{number}")
        assert code in (1, 75)
        assert lines[1].splitlines()[-1].startswith("error: ")
        said += lines
        struck.times = 0
    assert struck.struck
    assert command("publish", out, REPO)[0] == 0
    text = "\n".join([*said, caplog.text, *(d.decode(errors="replace") for d in contents(out).values())])
    assert "loopbackWrites" in hub.token
    assert "loopbackWrites" not in text
    client = [record.getMessage() for record in caplog.records if record.name.startswith("huggingface_hub")]
    assert "signature=" not in "\n".join([*said, *client])
