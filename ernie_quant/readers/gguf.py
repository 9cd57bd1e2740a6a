"""GGUF: keys and values, a table of tensors, data. Checked as strictly as llama.cpp's loader does.

Format: ggml-org/ggml, docs/gguf.md; the loader's demands: ggml-org/llama.cpp, ggml/src/gguf.cpp. Numbers of types:
ggml/include/ggml.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec
from ernie_quant.dtypes import BLOCKS
from ernie_quant.errors import CheckpointError
from ernie_quant.ggml import ALIGNMENT, MAX_DIMS, MAX_NAME, NUMBERS, U32
from ernie_quant.readers._gguf_head import MAX_KEY, MAX_KEYS, Head

SUFFIXES = (".gguf",)
ALIGNMENT_KEY = "general.alignment"
MAX_TENSORS = 100_000  # of a file; experts are stacked, so that the 300B has 700
LEAST_KEY, LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 4 + 8  # bytes of an entry

DTYPES = {number: dtype for dtype, number in NUMBERS.items()}
# what llama.cpp knows, or knew, and this program does not
UNREAD = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def read_header(path: Path) -> list[TensorRef]:
    """The tensors of one file, in file order. Raises CheckpointError."""
    with _head(path) as (head, tensors, keys):
        alignment = _keys(head, keys, keep=False).get(ALIGNMENT_KEY, ALIGNMENT)
        head.check_count(tensors, "tensors", LEAST_TENSOR, MAX_TENSORS)
        table: dict[str, tuple[TensorSpec, int]] = {}
        at = end = 0  # of the data: where the next tensor begins, and where the last one ends
        for number in range(tensors):
            name, spec, start = _entry(head, number)
            if name in table:
                head.refuse(name, "stands in the table twice")
            if start != at:
                what = "overlaps the tensor before it" if start < at else "leaves a hole before it"
                head.refuse(name, f"starts at {start}, {what}: it should start at {at}")
            table[name] = spec, start
            end = start + spec.nbytes
            at = _padded(end, alignment)
        data_start = _padded(head.at, alignment)
        _check_end(head, data_start + end if table else head.at, data_start + at)
    return [TensorRef(n, spec, path, (Extent(data_start + start, spec.nbytes),)) for n, (spec, start) in table.items()]


def read_keys(path: Path) -> dict[str, object]:
    """All keys of one file and their values, arrays as lists. Raises CheckpointError."""
    with _head(path) as (head, _, keys):
        return _keys(head, keys, keep=True)


@contextmanager
def _head(path: Path) -> Iterator[tuple[Head, int, int]]:
    """A header behind its counts: of tensors, of keys."""
    file_bytes = path.stat().st_size
    if not file_bytes:  # a named pipe too, which would make us wait
        raise CheckpointError(f"{path.name}: is no GGUF file: it is empty")
    with open(path, "rb", buffering=0) as file:
        head = Head(file, path.name, file_bytes)
        yield head, *head.counts()


def _keys(head: Head, count: int, keep: bool) -> dict[str, Any]:
    """Key -> value, or the alignment alone; where the tensors begin is where reading goes on."""
    head.check_count(count, "keys", LEAST_KEY, MAX_KEYS)
    found: dict[str, Any] = {}
    for number in range(count):
        key = _name(head, f"the name of key {number}", MAX_KEY)
        if key in found:
            head.refuse(key, "stands among the keys twice")
        kind = head.number("I", key)
        value = head.value(kind, key, keep or key == ALIGNMENT_KEY)
        found[key] = value
        if key == ALIGNMENT_KEY and (kind != U32 or value & (value - 1) or not value):
            head.refuse(key, f"is {value!r:.80}, not a power of two of 32 bits")
    return found


def _name(head: Head, what: str, most: int) -> str:
    name = head.text(what, most)
    if not name or not name.isprintable():
        head.refuse(what, f"is {name[:200]!r}, which is {'unprintable' if name else 'none'}")
    return name


def _entry(head: Head, number: int) -> tuple[str, TensorSpec, int]:
    """Name, shape and dtype of a tensor, and where its data begin."""
    name = _name(head, f"the name of tensor {number}", MAX_NAME)
    if (dims := head.number("I", name)) > MAX_DIMS:
        head.refuse(name, f"has {dims} dimensions, more than {MAX_DIMS}")
    shape = head.numbers("Q", dims, name)[::-1]
    kind = head.number("I", name)
    if kind not in DTYPES:
        what = f"{UNREAD[kind]} (type {kind})" if kind in UNREAD else f"type {kind}"
        head.refuse(name, f"is {what}, which this program does not read; it reads {', '.join(NUMBERS)}")
    spec = TensorSpec(shape, DTYPES[kind])
    if math.prod(n for n in shape if n) >= 2**63:
        head.refuse(name, f"its shape {shape} has more elements than can be counted")
    block, _ = BLOCKS.get(spec.dtype, (1, 1))
    if (shape[-1] if shape else 1) % block:
        head.refuse(name, f"{spec.dtype} {shape}: its rows are no multiple of the block of {block}")
    return name, spec, head.number("Q", name)


def _padded(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _check_end(head: Head, end: int, padded: int) -> None:
    """What is behind the last tensor is padding, or nothing. Raises CheckpointError."""
    if head.file_bytes < end:
        head.refuse("", f"truncated: the header promises {end} bytes, the file has {head.file_bytes}")
    if head.file_bytes > padded:
        head.refuse("", f"longer than its tensors: the header promises {padded} bytes, the file has {head.file_bytes}")
