"""verify reads values long after it has hashed the files; one that somebody writes to meanwhile is not verified."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import GOLDEN, copy, write

from ernie_quant.check import against
from ernie_quant.check.verify import verify
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import CheckpointError, VerifyError
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.readers import read_header

KEPT = "model.norm.weight"
RULES = Recipe("test", (RecipeRule(RoundToNearest(4, CHANNEL), ("attention",)),))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    write(GOLDEN / "moe/paddle", tmp_path / "out", recipe=RULES)
    return tmp_path / "out"


def at_the_first_weight(change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do it while verify decodes its first weight: all files are hashed by then, and the one of the weight is open."""
    left, decode = [change], RoundToNearest.decode

    def decoding(codec: RoundToNearest, encoded: object) -> object:
        if left:
            left.pop()()
        return decode(codec, encoded)  # type: ignore[arg-type]

    monkeypatch.setattr(RoundToNearest, "decode", decoding)


def test_a_result_that_is_left_alone_is_verified(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    at_the_first_weight(lambda: happened.append("nothing"), monkeypatch)
    assert verify(out).quantized == 3 * 4  # q, k, v and o of 3 layers
    assert happened == ["nothing"]


@pytest.mark.parametrize("how", ["written", "longer", "gone"])
def test_a_file_that_changes_while_it_is_verified_is_noticed(how: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The byte that changes is one of a kept weight: its hash was right a moment ago, and nobody reads it again."""
    file = out / "model.safetensors"
    size = file.stat().st_size
    (place,) = (ref.extents[0].start for ref in read_header(file) if ref.name == KEPT)

    def change() -> None:
        if how == "gone":
            file.unlink()
            return
        with open(file, "r+b") as opened:
            opened.seek(place if how == "written" else size)
            opened.write(b"\xaa")
        os.utime(file, ns=(1, 1))  # the clocks of file systems are coarse, and this test is fast

    at_the_first_weight(change, monkeypatch)
    with pytest.raises(CheckpointError) as error:
        verify(out)
    expected = {
        "written": "has changed since the run began (was written to)",
        "longer": f"has changed since the run began (has {size + 1} bytes, had {size})",
        "gone": "was there when the run began, and now: No such file or directory",
    }
    assert str(error.value).startswith(f"{file}: {expected[how]}")


def test_a_file_that_changes_after_its_hash_is_noticed(out: Path) -> None:
    """While a later file is hashed: no value of it is read any more."""
    file = out / "model.safetensors"
    order = list(json.loads((out / "ernie-quant.json").read_text())["files"])
    assert file.name in order[:-1]
    hashed, before = [0], sum((out / name).stat().st_size for name in order[: order.index(file.name) + 1])

    def progress(nbytes: int) -> None:
        hashed[0] += nbytes
        if hashed[0] > before and file.stat().st_mtime_ns != 1:
            with open(file, "r+b") as opened:
                opened.seek(-1, os.SEEK_END)
                opened.write(b"\xaa")
            os.utime(file, ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"model\.safetensors: has changed since the run began"):
        verify(out, progress=progress)


def test_a_source_that_changes_meanwhile_is_noticed(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the back of the very last comparison: its file is open, and nobody opens it again."""
    source = copy(GOLDEN / "moe/paddle", tmp_path / "source")
    read, reads, last = against.read, [0], [0]

    def counting(*arguments: Any) -> Any:
        reads[0] += 1
        values = read(*arguments)
        if reads[0] == last[0]:
            for file in source.glob("*.safetensors"):
                os.utime(file, ns=(1, 1))
        return values

    monkeypatch.setattr(against, "read", counting)
    assert verify(out, source).against
    reads, last = [0], [reads[0]]
    with pytest.raises(VerifyError) as error:
        verify(out, source)
    assert reads == last
    assert ["was written to" in problem for problem in error.value.problems] == [True]
