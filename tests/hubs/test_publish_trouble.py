"""Publishing whatever the hub does in between: races, lost answers, interruptions; and no token for strangers."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hub.storage import Repo
from helpers.hubs import uploads
from helpers.publishing import REPO, commits, hashes, objects, objects_sent, on_hub, publish_to, weights
from helpers.runs import Killed

from ernie_quant.errors import HubError, RetryError
from ernie_quant.hubs import publisher
from ernie_quant.publish import RACES, Destination, publish
from ernie_quant.publish.files import UPLOADED

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures", "waits")]


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
        publish(out, publisher("hf"), Destination(REPO), killed_after(order.index(weights(out)[1].name) + 1))
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
            publish(out, publisher("hf"), Destination(REPO, delete=True), progress)
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
        publish(out, publisher("hf"), Destination(REPO, delete=True), killed_after(len(contents(out)) - 2))
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
