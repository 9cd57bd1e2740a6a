"""GGUF: keys and values, a table of tensors, data with zeros between them. Loaded by llama.cpp and what is built on it.

Format: ggml-org/ggml, docs/gguf.md; the loader's demands: ggml-org/llama.cpp, ggml/src/gguf.cpp. Names of split files:
src/llama-model-loader.cpp (llama_split_path).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.ggml import ALIGNMENT, ARRAY, BOOL, F32, I32, MAGIC, NUMBERS, SCALARS, STRING, U16, U32, Number
from ernie_quant.ggml import VERSION as GGUF_VERSION
from ernie_quant.writers import FileLayout, Specs

VERSION = 1
EXTENSION = ".gguf"
INDEX = ""
SELF_CONTAINED = True


def order(specs: Specs) -> dict[str, TensorSpec]:
    """As they come: the loader takes any order."""
    return dict(specs)


def metadata_of(metadata: Mapping[str, Any], files: Sequence[Specs], number: int) -> Mapping[str, Any]:
    """Of several files each says which it is, and the first has all the rest."""
    if len(files) == 1:
        return metadata
    split = {
        "split.no": Number(number, U16),
        "split.count": Number(len(files), U16),
        "split.tensors.count": Number(sum(map(len, files)), I32),
    }
    return split if number else {**metadata, **split}


def lay_out(specs: Specs, metadata: Mapping[str, Any]) -> FileLayout:
    """Magic, version, counts, keys, the table; every tensor begins at a multiple of 32 bytes, and the file ends at one."""
    head = bytearray(MAGIC + struct.pack("<IQQ", GGUF_VERSION, len(specs), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _typed(value)
    at = 0
    places: dict[str, int] = {}
    for name, spec in specs.items():
        dims = spec.shape[::-1] or (1,)
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, NUMBERS[spec.dtype], at)
        places[name] = at
        at += _padded(spec.nbytes)
    head += bytes(_padded(len(head)) - len(head))
    return FileLayout(bytes(head), {name: len(head) + start for name, start in places.items()}, len(head) + at)


def index(files: Mapping[str, Specs]) -> dict[str, Any]:
    """There is none."""
    return {}


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """The number of a value's type, and the value."""
    if isinstance(value, tuple):
        kind = _kind(value[0]) if value else STRING
        kind = I32 if kind == U32 else kind
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + _elements(value, kind)
    kind = _kind(value)
    return struct.pack("<I", kind) + _elements((value.value if isinstance(value, Number) else value,), kind)


def _kind(value: Any) -> int:
    if isinstance(value, Number):
        return value.kind
    return {bool: BOOL, int: U32, float: F32, str: STRING}[type(value)]


def _elements(values: Sequence[Any], kind: int) -> bytes:
    if kind == STRING:
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)
