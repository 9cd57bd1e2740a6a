"""`publish --eval`: what an evaluation found stands in the card, and belongs to the result from then on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import Command, refusal
from helpers.hub import LoopbackHub
from helpers.hubs import SOURCE, uploads, writes
from helpers.models import copy
from helpers.publishing import REPO, hashes, on_hub
from helpers.words import byte_tokenizer

from ernie_quant.reporting import evaluation, tables

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures", "waits")]


@pytest.fixture
def kept(out: Path, tmp_path: Path, command: Command) -> Path:
    """An evaluation of `out`."""
    source = byte_tokenizer(copy(SOURCE, tmp_path / "source"))
    (tmp_path / "book.txt").write_text("".join(f"{n} and {n * n}.\n" for n in range(200)))
    file = tmp_path / "kept.json"
    code, _, err = command(
        "eval", out, "--against", source, "--text", tmp_path / "book.txt", "--tokens", 1022, "--save", file
    )  # fmt: skip
    assert (code, err) == (0, "")
    return file


def test_the_card_has_what_was_found(hub: LoopbackHub, out: Path, kept: Path, command: Command) -> None:
    assert command("publish", out, REPO, "--eval", kept, "-q")[0] == 0
    card = hub.repo(REPO).read("README.md").decode()
    assert "## Evaluation" in card
    head, lines, note = evaluation.columns(json.loads(kept.read_text()))
    assert tables.markdown(head, lines) in card
    assert note in card
    assert "KL: of (source || this), nats per token." in card
    assert "book.txt" in card
    assert json.loads(hub.repo(REPO).read("eval.json")) == json.loads(kept.read_text())
    assert on_hub(hub) == hashes(out)
    code, said, _ = command("publish", out, REPO, "-q", "--json")  # without it: it belongs to the result now
    assert (code, json.loads(said)["status"]) == (0, "up-to-date")
    assert command("verify", out)[0] == 0


def test_an_evaluation_of_another_result_is_refused(hub: LoopbackHub, out: Path, kept: Path, command: Command) -> None:
    value = json.loads(kept.read_text())
    before = hashes(out)
    value["result"]["fingerprint"] = "0" * 64
    kept.write_text(json.dumps(value))
    assert f"{kept}: is of another result (fingerprint 000000000000, {out} has" in refusal(
        command, "publish", out, REPO, "--eval", kept
    )
    value["result"]["fingerprint"] = ""
    kept.write_text(json.dumps(value))
    assert "is of another result (fingerprint unknown" in refusal(command, "publish", out, REPO, "--eval", kept)
    assert hashes(out) == before
    assert writes(hub) == []


def test_what_is_no_evaluation(hub: LoopbackHub, out: Path, kept: Path, tmp_path: Path, command: Command) -> None:
    value = json.loads(kept.read_text())
    del value["rows"][0]["kl"]
    for text in ("{}", json.dumps(value), json.dumps({**value, "rows": []}), json.dumps({**value, "rows": {"a": 1}})):
        kept.write_text(text)
        told = refusal(command, "publish", out, REPO, "--eval", kept)
        assert told == f"error: {kept}: is no result of eval (--save)\n"
    told = refusal(command, "publish", out, REPO, "--eval", tmp_path / "nothing.json")
    assert "nothing.json: cannot be read: No such file or directory" in told
    assert writes(hub) == []
