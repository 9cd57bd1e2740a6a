"""Files of text as documents: what is read, and the one line for what cannot be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from helpers.words import Bytes, lines

from ernie_quant.calibration import texts
from ernie_quant.calibration.texts import read_text, tokens
from ernie_quant.errors import TextError


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfone\n\n\xe4\xba\x8c\n"
    (tmp_path / "a.md").write_bytes(raw)
    text = read_text(tmp_path / "a.md")
    assert (text.name, text.documents) == ("a.md", ("one\n\n二\n",))
    assert text.sha256 == hashlib.sha256(raw).hexdigest()


def test_lines_hold_texts_and_conversations(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = lines(tmp_path / "a.jsonl", "one", {"messages": said, "id": 3}, {"text": "two", "messages": said})
    file.write_text(file.read_text() + "\n  \n")
    assert read_text(file).documents == ("one", said, "two")


def test_the_shuffle_is_the_same_everywhere(tmp_path: Path) -> None:
    text = read_text(lines(tmp_path / "a.jsonl", *"abcdefgh"))
    assert "".join(text.shuffled(0)) == "gfbcdeah"
    assert "".join(text.shuffled(1)) == "edfgabch"


def test_a_long_document_is_cut_after_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 6)
    pieces = [bytes(piece[:-1] if piece[-1] == 255 else piece).decode() for piece in tokens("ab\ncd\nefghijklm\n", Bytes())]
    assert pieces == ["ab\ncd\n", "efghij", "klm\n", ""]  # the last one is the end of the text


NEITHER = 'line 2: has neither a text nor messages, {"text": …} or {"messages": [{"role": …, "content": …}]}'


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 text (byte 0xe9 at 3)"),
        ("a.bin", b"\x7fELF\0\1", "is not text (a zero byte at 4)"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "x"}', NEITHER),
        ("a.jsonl", b'{"text": "x"}\n["x"]', NEITHER),
        ("a.jsonl", b'{"text": "x"}\n{"messages": []}', NEITHER),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: a message has a role and a content, both of them text"),
        ("a.jsonl", b'{"text": "x"', "line 1: is not valid JSON"),
        ("a.jsonl", b'{"text": "\xe9"}', "line 1: is not valid JSON"),
    ],
)
def test_what_is_no_text(name: str, raw: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(TextError) as error:
        read_text(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}")
    assert told in str(error.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nothing\.txt: cannot be read: No such file or directory"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(TextError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
