"""Targets with a text: planned, made, and left alone as long as neither the text nor anything else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hub import LoopbackHub
from helpers.hubs import NAME, SOURCE, uploads
from helpers.models import copy
from helpers.nights import WINT4, Night, job_file, statuses
from helpers.words import byte_tokenizer

from ernie_quant.errors import RetryError, TextError
from ernie_quant.nightly.job import read_job

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures", "no_waiting_for_the_disk")]

TEXT = '[target.calibration]\ntext = ["book.txt"]\ntokens = 512\nmethod = "nearest"\n'


def write_book(folder: Path, word: str = "odd") -> Path:
    (folder / "book.txt").write_text("".join(f"{n} is {word if n % 2 else 'even'} and {n * n}.\n" for n in range(200)))
    return folder / "book.txt"


def test_the_text_is_part_of_what_is_up_to_date(hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    hub.put(NAME, byte_tokenizer(copy(SOURCE, tmp_path / "src")))
    write_book(night.folder)
    target = WINT4 + TEXT
    assert statuses(night(target)) == ["published"]
    said = json.loads(hub.repo("me/tiny-wint4").read("report.json"))["calibration"]
    assert (said["name"], said["tokens"], said["method"], said["fit"]) == ("book.txt", 512, "nearest", False)
    assert statuses(night(target)) == ["up-to-date"]
    write_book(night.folder, "not even")
    assert statuses(night(target)) == ["published"]
    assert statuses(night(WINT4)) == ["published"]  # without a text it is another result


def test_a_source_without_a_tokenizer_is_refused_before_any_work(hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    write_book(night.folder)
    with pytest.raises(TextError, match="has no tokenizer"):
        night(WINT4.replace("wint4", "other", 1), WINT4 + TEXT)
    assert not {repo for repo in hub.store.repos if repo.startswith("me/")}
    assert not night.left


def test_what_is_no_text_is_refused_before_the_source_is_asked_for(hub: LoopbackHub, night: Night) -> None:
    (night.folder / "book.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match=r"book\.txt: is not UTF-8 text"):
        night(WINT4 + TEXT)
    assert night.events[0]["event"] == "error"


def test_the_time_is_up_while_text_runs_through(
    hub: LoopbackHub, night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_quant.calibration import calibrated

    hub.put(NAME, byte_tokenizer(copy(SOURCE, tmp_path / "src")))
    write_book(night.folder)

    def late(*_: object) -> None:
        raise RetryError("max_hours have passed; the next run goes on where this one stopped")

    with monkeypatch.context() as patched:
        patched.setattr(calibrated.Where, "moved", lambda self, place: late() if place.endswith("down_proj") else None)
        assert statuses(night(WINT4 + TEXT)) == ["retry"]
    assert night.left
    assert statuses(night(WINT4 + TEXT)) == ["published"]


def test_a_file_is_looked_for_beside_the_job(tmp_path: Path) -> None:
    book = write_book(tmp_path)
    (target,) = read_job(job_file(tmp_path, WINT4 + TEXT)).targets
    assert target.recipe.calibration is not None
    assert target.recipe.calibration.text == (book,)
