"""tokenizer.model: pieces, scores and kinds out of a SentencePiece model, which is a protocol buffer.

Format: google/sentencepiece, src/sentencepiece_model.proto (ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec;
SentencePiece: 1 piece, 2 score, 3 type; NormalizerSpec: 3 add_dummy_prefix; TrainerSpec: 3 model_type, 40 unk_id).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary.special import BYTE, NORMAL, UNKNOWN
from ernie_quant.vocabulary.tokens import Tokens

MAX_BYTES = 64 << 20  # ERNIE's has 1.6 MB
MAX_PIECES = 1 << 20
BPE = 2  # model_type; 1 is unigram, which llama.cpp's "llama" does not compute
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read(path: Path) -> Tokens:
    """The tokens of a model. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{path.name}: is larger than {MAX_BYTES} bytes, which no vocabulary is")
    try:
        return _tokens(path.name, raw)
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path.name}: is no SentencePiece model ({error})") from None


def _tokens(name: str, raw: bytes) -> Tokens:
    texts, scores, kinds = [], [], []
    prefix, kind_of_model = True, BPE
    for field, value in _fields(raw):
        if field == 1 and isinstance(value, bytes):
            text, score, kind = _piece(value)
            texts.append(text)
            scores.append(score)
            kinds.append(kind)
            if len(texts) > MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES} pieces")
        elif field == 2 and isinstance(value, bytes):
            kind_of_model = next((v for f, v in _fields(value) if f == 3 and isinstance(v, int)), 1)
        elif field == 3 and isinstance(value, bytes):
            prefix = next((bool(v) for f, v in _fields(value) if f == 3), True)
    if not texts:
        raise ValueError("it has no pieces")
    if kind_of_model != BPE:
        raise ValueError(f"its model_type is {kind_of_model}, not {BPE} (BPE), and llama.cpp cuts texts by BPE")
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else None
    return Tokens(name, "llama", "default", tuple(texts), tuple(kinds), tuple(scores), unknown=unknown, space_prefix=prefix)


def _piece(raw: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(raw):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, float):
            score = value
        elif field == 3 and isinstance(value, int):
            kind = value
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"the piece {text[:40]!r} is of the type {kind}")
    return text, score, kind


def _fields(raw: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of every field of a message. Raises ValueError where it is none."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind)
        if kind == BYTES:
            size, at = _varint(raw, at)
        if size is None or at + size > len(raw):
            raise ValueError(f"a field of {size or 'unknown'} bytes at {at}, of {len(raw)}")
        part = raw[at : at + size]
        at += size
        yield key >> 3, struct.unpack("<f", part)[0] if kind == FIXED32 else part


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 10 bytes at {at - 10}")
