"""GGUF files byte by byte, true or not."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from ernie_quant.ggml import NUMBERS
from ernie_quant.readers.gguf import UNREAD

TYPES = {**NUMBERS, **{name: number for number, name in UNREAD.items()}}
LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A length, true unless given, and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def element(kind: int, value: object) -> bytes:
    """A value without its type; bytes as they are."""
    if isinstance(value, bytes):
        return value
    return string(value) if isinstance(value, str) else struct.pack(f"<{LETTERS[kind]}", value)


def key(name: str | bytes, kind: int, value: object) -> bytes:
    """A key and one value: `key("a", U32, 7)`."""
    return string(name) + struct.pack("<I", kind) + element(kind, value)


def array(name: str, kind: int, values: Sequence[object], count: int | None = None) -> bytes:
    """A key and several values."""
    head = string(name) + struct.pack("<IIQ", 9, kind, len(values) if count is None else count)
    return head + b"".join(element(kind, value) for value in values)


def tensor(name: str | bytes, dims: Sequence[int] = (4,), dtype: str | int = "F32", offset: int = 0) -> bytes:
    """An entry of the table; `dims` as they are stored, the row first."""
    kind = dtype if isinstance(dtype, int) else TYPES[dtype]
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `counts` of tensors and keys are true unless given."""
    head = start + struct.pack("<QQ", *(counts or (len(tensors), len(keys)))) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment if tensors or data else 0) + data


def write(path: Path, *args: Sequence[bytes], **more: object) -> Path:
    """`file_of` in a file."""
    path.write_bytes(file_of(*args, **more))  # type: ignore[arg-type]
    return path
