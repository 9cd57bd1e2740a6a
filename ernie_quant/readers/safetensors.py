"""safetensors headers, checked more strictly than the format's own library does.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON, data).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ernie_quant import jsonio
from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec
from ernie_quant.dtypes import ITEMSIZE
from ernie_quant.errors import CheckpointError

SUFFIXES = (".safetensors",)
MAX_DIMS = 8


def read_header(path: Path) -> list[TensorRef]:
    """The tensors of one file, in file order."""
    file_bytes = path.stat().st_size
    header, data_start = _read_json(path, file_bytes)
    refs = [_ref(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    refs.sort(key=lambda r: (r.extents[0].start, r.extents[0].nbytes))
    _check_cover(path, refs, data_start, file_bytes)
    return refs


def _read_json(path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    with open(path, "rb", opener=_no_follow_fifo) as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or length > file_bytes - 8:
            raise CheckpointError(f"{path.name}: header length {length} does not fit a file of {file_bytes} bytes")
        if length > jsonio.MAX_BYTES:  # before it is read
            raise CheckpointError(f"{path.name}: header is too large: {length} bytes, {jsonio.MAX_BYTES} are allowed")
        raw = file.read(length)
    try:
        header = jsonio.parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{path.name}: header is {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: header is not a JSON object")
    return header, 8 + length


def _no_follow_fifo(path: str, flags: int) -> int:
    """Open without blocking, so that a named pipe in a stranger's folder cannot hang us."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _ref(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    if not name.isprintable():
        raise CheckpointError(f"{path.name}: holds a tensor of the unprintable name {name[:200]!r}")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
            type(start) is type(stop) is int
        ):
            pass
        case _:
            raise CheckpointError(f"{path.name}: {name}: header entry lacks dtype, shape or data_offsets")
    if dtype not in ITEMSIZE:
        raise CheckpointError(f"{path.name}: {name}: unknown dtype {dtype[:200]!r}")
    if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise CheckpointError(f"{path.name}: {name}: shape is not a list of at most {MAX_DIMS} sizes")
    if math.prod(shape) * ITEMSIZE[dtype] != stop - start or start < 0:
        raise CheckpointError(
            f"{path.name}: {name}: {dtype} {tuple(shape)} takes {math.prod(shape) * ITEMSIZE[dtype]} bytes,"
            f" the header gives it {start} to {stop}"
        )
    # U16 in Paddle files holds bfloat16 bits; no genuine uint16 tensor exists in these models
    spec = TensorSpec(tuple(shape), "BF16" if dtype == "U16" else dtype)
    return TensorRef(name, spec, path, (Extent(data_start + start, stop - start),))


def _check_cover(path: Path, refs: list[TensorRef], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the file from the header to its end, without holes and overlaps."""
    at = data_start
    for ref in refs:
        extent = ref.extents[0]
        if extent.start != at:
            what = "overlaps the tensor before it" if extent.start < at else "leaves a hole before it"
            raise CheckpointError(f"{path.name}: {ref.name}: starts at {extent.start - data_start}, {what}")
        at += extent.nbytes
    if at != file_bytes:
        what = "truncated" if at > file_bytes else "longer than its tensors"
        raise CheckpointError(f"{path.name}: {what}: the header promises {at} bytes, the file has {file_bytes}")
