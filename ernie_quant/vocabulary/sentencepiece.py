"""tokenizer.model, a SentencePiece ModelProto: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

    1  repeated piece       1 text, 2 score (float), 3 type (1 if not there)
    2  how it was trained   3 model type (1 unigram, 2 BPE), 24 spaces are suffixes
    3  how texts are read   2 table of characters, 3 add a space before, 4 remove extra spaces, 5 spaces become a letter

Every file is walked in bounded time and memory, whatever it holds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary._files import PIECES, Files
from ernie_quant.vocabulary._table import BYTE, NORMAL, SPACE, USER_DEFINED, Loaded, Token

MAX_BYTES = 64 << 20  # ERNIE's has 1.6 MB
MAX_FIELDS = 1_500_000  # in all messages together; a piece has three
MAX_PIECES = 300_000  # three times ERNIE's
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # wire types of protobuf: how long a value is
UNIGRAM, BPE = 1, 2
KINDS = {1: "unigram", 3: "words", 4: "characters"}

Value = int | memoryview


class _Garbage(ValueError):
    """What a ModelProto does not hold."""


@dataclass(frozen=True)
class Model:
    """What a ModelProto says; where it says nothing, the defaults of its .proto."""

    pieces: tuple[Token, ...]
    kind: int = UNIGRAM
    suffixes: bool = False
    characters: bool = False
    dummy_prefix: bool = True
    extra_removed: bool = True
    escaped: bool = True


def load(files: Files, rows: int) -> Loaded:
    """tokenizer.model as llama.cpp knows it. Raises CheckpointError, also for what llama.cpp would read otherwise."""
    model = parse(files.raw(PIECES, MAX_BYTES))
    if len(model.pieces) > rows:
        raise CheckpointError(f"{PIECES}: has {len(model.pieces)} pieces, but the embedding has {rows} rows")
    _check(model)
    tokens = {i: _as_matched(piece) for i, piece in enumerate(model.pieces)}
    return Loaded("llama", "default", tokens, (), None, model.dummy_prefix, tuple(_notes(model)))


def parse(data: bytes) -> Model:
    """A ModelProto. Raises CheckpointError."""
    try:
        return _model(_Walk(), memoryview(data))
    except _Garbage as error:
        raise CheckpointError(f"{PIECES}: is no SentencePiece model: {error}") from None


def _as_matched(piece: Token) -> Token:
    """A user-defined piece as llama.cpp finds it where SentencePiece does.

    That looks for it in a text whose spaces are letters already, so one with a plain space is never found; llama.cpp looks in
    the text as it is.
    """
    if piece.kind != USER_DEFINED:
        return piece
    return replace(piece, kind=NORMAL) if " " in piece.text else replace(piece, text=piece.text.replace(SPACE, " "))


def _check(model: Model) -> None:
    if model.kind != BPE:
        raise CheckpointError(
            f"{PIECES}: is of the type {KINDS.get(model.kind, model.kind)}; llama.cpp reads ERNIE's tokenizers as BPE only"
        )
    if model.suffixes or not model.escaped:
        what = "puts spaces behind words" if model.suffixes else "leaves spaces as they are"
        raise CheckpointError(f"{PIECES}: {what}; llama.cpp does not")
    seen: set[str] = set()
    for i, piece in enumerate(model.pieces):
        if piece.text in seen or not piece.text:
            raise CheckpointError(f"{PIECES}: piece {i}, {piece.text!r:.60}, {'is there twice' if piece.text else 'is empty'}")
        seen.add(piece.text)


def _notes(model: Model) -> Iterator[str]:
    """In what llama.cpp's tokens may differ from SentencePiece's."""
    if model.characters:
        yield f"{PIECES} rewrites some characters first (full-width letters, for one); llama.cpp does not: such texts differ"
    if model.extra_removed:
        yield f"{PIECES} removes spaces at the ends of a text and all but one in a row; llama.cpp does not: such texts differ"
    if model.dummy_prefix and any(piece.kind == USER_DEFINED for piece in model.pieces):
        yield f"{PIECES} puts a space before a text; llama.cpp does so behind every piece of the type user-defined too"
    if (n := sum(piece.kind == BYTE for piece in model.pieces)) < 256:
        yield f"{PIECES} has pieces for {n} of the 256 bytes: llama.cpp may stop at a character that has no piece"


# --- protobuf ----------------------------------------------------------------------------------------------------------


class _Walk:
    """Fields of messages within messages; counts all of them."""

    def __init__(self) -> None:
        self.fields = 0

    def through(self, data: memoryview) -> Iterator[tuple[int, int, Value]]:
        """Number, wire type and value of every field. Raises _Garbage."""
        at = 0
        while at < len(data):
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise _Garbage(f"more than {MAX_FIELDS} fields")
            key, at = _varint(data, at)
            wire, size = key & 7, 0
            if wire == VARINT:
                value, at = _varint(data, at)
                yield key >> 3, wire, value
                continue
            if wire == BYTES:
                size, at = _varint(data, at)
            elif wire in (EIGHT, FOUR):
                size = 8 if wire == EIGHT else 4
            else:
                raise _Garbage(f"a field of wire type {wire}")
            if size > len(data) - at:
                raise _Garbage(f"a field of {size} bytes where {len(data) - at} are left")
            yield key >> 3, wire, data[at : at + size]
            at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at `at` and where it ends: seven bits a byte, the lowest first."""
    if at < len(data) and data[at] < 128:
        return data[at], at + 1
    value = 0
    for place in range(10):
        if at + place >= len(data):
            raise _Garbage("it ends within a number")
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise _Garbage("a number of more than ten bytes")


def _model(walk: _Walk, data: memoryview) -> Model:
    pieces: list[Token] = []
    said: dict[str, int] = {}
    for number, wire, value in walk.through(data):
        if number not in (1, 2, 3):
            continue
        message = _message(wire, value, f"field {number}")
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise _Garbage(f"more than {MAX_PIECES} pieces")
            pieces.append(_piece(walk, message, len(pieces)))
        elif number == 2:
            said |= _numbers(walk, message, {3: "kind", 24: "suffixes"})
        else:
            said |= _numbers(walk, message, {2: "characters", 3: "dummy_prefix", 4: "extra_removed", 5: "escaped"})
    if not pieces:
        raise _Garbage("it has no pieces")
    return Model(tuple(pieces), said.pop("kind", UNIGRAM), **{name: bool(value) for name, value in said.items()})


def _numbers(walk: _Walk, message: memoryview, names: dict[int, str]) -> dict[str, int]:
    """The fields that have names: a number, or how long a text is."""
    return {
        names[number]: value if isinstance(value, int) else len(value)
        for number, _, value in walk.through(message)
        if number in names
    }


def _piece(walk: _Walk, message: memoryview, at: int) -> Token:
    text, score, kind = "", 0.0, NORMAL
    for number, wire, value in walk.through(message):
        if number == 1:
            try:
                text = bytes(_message(wire, value, f"the text of piece {at}")).decode()
            except UnicodeDecodeError:
                raise _Garbage(f"piece {at} is not UTF-8") from None
        elif number == 2:
            if wire != FOUR or isinstance(value, int):
                raise _Garbage(f"the score of piece {at} is no float")
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = value if isinstance(value, int) else 0
    if not NORMAL <= kind <= BYTE or not math.isfinite(score):
        raise _Garbage(f"piece {at} has the type {kind} and the score {score}")
    return Token(text, score, kind)


def _message(wire: int, value: Value, what: str) -> memoryview:
    if wire != BYTES or isinstance(value, int):
        raise _Garbage(f"{what} has the wire type {wire}, not {BYTES}")
    return value
