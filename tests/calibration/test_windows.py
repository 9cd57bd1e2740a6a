"""Windows: shares at every length, windows for judging, the same ones everywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.words import Bytes, lines

from ernie_quant.calibration import windows as module
from ernie_quant.calibration.texts import read_text
from ernie_quant.calibration.windows import AUTO, FOLDER, SHARES, Windows, beginning, windows
from ernie_quant.errors import TextError


def text(letter: str, count: int, length: int = 9) -> list[str]:
    return [letter * length] * count


def letters(found: Windows) -> str:
    """First letter of each window; capital for judging."""
    pairs = zip(found.ids[:, 0].tolist(), found.judged.tolist(), strict=True)
    return "".join(chr(first).upper() if judged else chr(first) for first, judged in pairs)


def test_files_have_equal_shares(tmp_path: Path) -> None:
    files = [lines(tmp_path / f"{c}.jsonl", *text(c, 40)) for c in "ab"]
    found = windows(Bytes(), files, 160, length=10)
    assert letters(found) == "abababaAbabababBabA"
    assert found.ids.dtype == torch.int64
    assert found.ids[0].tolist() == [*b"a" * 9, 255]
    assert found.description["tokens"] == 160
    assert found.description["judging_tokens"] == 30
    assert found.description["tokens_of"] == {"a.jsonl": 100, "b.jsonl": 90}
    assert found.description["sha256"] == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert found.groups[:3] == ("a.jsonl", "b.jsonl", "a.jsonl")


def test_who_runs_out_is_made_up_for(tmp_path: Path) -> None:
    files = [lines(tmp_path / f"{c}.jsonl", *text(c, n)) for c, n in (("a", 2), ("b", 40))]
    assert letters(windows(Bytes(), files, 60, length=10, judge=False)) == "ababbb"


def test_one_window_has_one_for_judging(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *text("a", 9))
    assert letters(windows(Bytes(), [file], 1, length=10)) == "aA"
    assert letters(windows(Bytes(), [file], 70, length=10)) == "aaaaaaaA"


def test_too_few_tokens_are_counted(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *text("a", 9))
    with pytest.raises(
        TextError, match=r"a\.jsonl: has 80 tokens and 10 for judging, in windows of 10; 800 are wanted: name more"
    ):
        windows(Bytes(), [file], 800, length=10)
    with pytest.raises(TextError, match=r"a\.jsonl: has 0 tokens, in windows of 512; 1 are wanted"):
        windows(Bytes(), [file], 1)
    with pytest.raises(TextError, match=r"auto: has \d+ tokens and \d+ for judging.* name files of your own"):
        windows(Dense(), AUTO, 10**8)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [lines(folder / "a.jsonl", "a") for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(TextError, match=r"two texts are called a\.jsonl; rename one"):
        windows(Bytes(), files, 1)


def test_a_group_shares_its_tokens_among_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a has twice the weight of b, in documents of other lengths."""
    lines(tmp_path / "a.jsonl", *text("a", 200, 4))
    lines(tmp_path / "b.jsonl", *text("b", 100, 19))
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "SHARES", (("both", 1.0, {"a": 2.0, "b": 1.0}),))
    counts = windows(Bytes(), AUTO, 600, length=10, judge=False).description["tokens_of"]
    assert counts["a.jsonl"] == pytest.approx(400, abs=20)
    assert sum(counts.values()) == 600


# --- the texts that come with it -------------------------------------------------------------------------------------


def test_the_texts_of_auto_are_those_of_the_table() -> None:
    kinds = [kind for _, _, weights in SHARES for kind in weights]
    assert sorted(kinds) == sorted(p.stem for p in FOLDER.glob("*.jsonl"))
    assert len(set(kinds)) == len(kinds)
    assert sum(share for _, share, _ in SHARES) == pytest.approx(1)
    for kind in kinds:
        assert read_text(FOLDER / f"{kind}.jsonl").documents


class Dense(Bytes):
    """As many tokens as a real tokenizer makes, about: four bytes in one, and text for a conversation."""

    def ids(self, text: str) -> list[int]:
        return list(text.encode()[::4])

    def chat(self, messages: object) -> str:
        return "\n".join(message["content"] for message in messages)  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [25, 50])
def test_any_beginning_of_auto_has_its_shares(count: int) -> None:
    found = windows(Dense(), AUTO, 50 * 512)
    groups = [group for group, judged in zip(found.groups, found.judged, strict=True) if not judged][:count]
    for name, share, _ in SHARES:
        assert Counter(groups)[name] == pytest.approx(share * count, abs=1)


def test_auto_has_every_language_early() -> None:
    counts = windows(Dense(), AUTO, 32 * 512).description["tokens_of"]
    assert [name for name, count in counts.items() if not count] == []


def test_auto_is_the_same_in_every_process() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_windows import Dense, fingerprint\nprint(fingerprint(Dense()))"
    tests = str(Path(__file__).parent)
    runs = [
        subprocess.run([sys.executable, "-c", code, tests], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout.strip()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs == [fingerprint(Dense())] * 2


def fingerprint(tokenizer: Bytes) -> str:
    return hashlib.sha256(windows(tokenizer, AUTO, 8192, seed=3).ids.numpy().tobytes()).hexdigest()


def test_another_seed_is_another_choice() -> None:
    one, two = (windows(Dense(), AUTO, 8192, seed=seed).ids for seed in (0, 1))
    assert not torch.equal(one, two)


# --- from the beginning ----------------------------------------------------------------------------------------------


def test_the_beginning_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij")
    name, ids = beginning(Bytes(), tmp_path / "a.txt", 2, 4)
    assert (name.name, ids.tolist()) == ("a.txt", [[*b"abcd"], [*b"efgh"]])
    with pytest.raises(TextError, match=r"a\.txt: has 11 tokens, 3 windows of 4 are 12; ask for fewer"):
        beginning(Bytes(), tmp_path / "a.txt", 3, 4)
