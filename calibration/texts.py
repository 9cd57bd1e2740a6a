"""Texts of people, as documents: plain files, and .jsonl with a `text` or `messages` in every line."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant.calibration.tokenizer import Messages, Tokenizer

from ernie_quant.errors import TextError
from ernie_quant.jsonio import parse

MAX_BYTES = 1 << 30  # of a file; it is read whole
PIECE = 1 << 20  # characters of a document that are turned into tokens at a time


@dataclass(frozen=True, eq=False)
class Text:
    """A file: its documents, in order, and the hash of its bytes."""

    name: str
    sha256: str
    documents: tuple[str | Messages, ...]

    def shuffled(self, seed: int) -> list[str | Messages]:
        """The same order on every machine."""
        found = list(self.documents)
        random.Random(f"{seed} {self.name}").shuffle(found)
        return found


def read_text(file: Path) -> Text:
    """All documents of a file; a plain one is a single document. Raises TextError."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise TextError(f"{file}: has more than {MAX_BYTES >> 30} GiB; cut it")
        raw = file.read_bytes()
    except OSError as error:
        raise TextError(f"{file}: cannot be read: {error.strerror}") from None
    documents = tuple(_lines(file, raw)) if file.suffix == ".jsonl" else (_decoded(str(file), raw),)
    if not any(document.strip() if isinstance(document, str) else document for document in documents):
        raise TextError(f"{file}: holds no text")
    return Text(file.name, hashlib.sha256(raw).hexdigest(), documents)


def tokens(document: str | Messages, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Its token ids, a piece of it at a time, and the token that stands between documents."""
    text = document if isinstance(document, str) else tokenizer.chat(document)
    for piece in _pieces(text):
        yield tokenizer.ids(piece)
    if tokenizer.eos is not None:
        yield [tokenizer.eos]


def _pieces(text: str) -> Iterator[str]:
    """Cut after a line where there is one: a tokenizer takes minutes for a long text of which a little is wanted."""
    at = 0
    while at < len(text):
        end = at + PIECE
        if end < len(text):
            end = text.rfind("\n", at, end) + 1 or end
        yield text[at:end]
        at = end


def _decoded(place: str, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{place}: is not UTF-8 text (byte 0x{raw[error.start]:02x} at {error.start})") from None
    if "\0" in text:
        raise TextError(f"{place}: is not text (a zero byte at {raw.index(0)})")
    return text


def _lines(file: Path, raw: bytes) -> Iterator[str | Messages]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            value = parse(line)
        except ValueError as error:
            raise TextError(f"{place}: is {error}") from None
        yield _document(place, value)


def _document(place: str, value: Any) -> str | Messages:
    """Raises TextError."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        return str(value["text"])
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise TextError(
            f'{place}: has neither a text nor messages, {{"text": …}} or {{"messages": [{{"role": …, "content": …}}]}}'
        )
    for message in messages:
        both = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not both:
            raise TextError(f"{place}: a message has a role and a content, both of them text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
