"""safetensors: length, JSON header, data without holes. Readable by `safe_open` and by its strictest checks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.dtypes import ITEMSIZE
from ernie_quant.writers import FileLayout, Specs

VERSION = 1
EXTENSION = ".safetensors"
INDEX = "model.safetensors.index.json"
SELF_CONTAINED = False


def order(specs: Specs) -> dict[str, TensorSpec]:
    """As they come, so that writing is sequential; tensors of odd sizes last, so that every start is aligned."""
    aligned = [item for item in specs.items() if item[1].nbytes % 8 == 0]
    odd = [item for item in specs.items() if item[1].nbytes % 8]
    return dict(aligned + sorted(odd, key=lambda item: -ITEMSIZE[item[1].dtype]))


def metadata_of(metadata: Mapping[str, Any], files: Sequence[Specs], number: int) -> Mapping[str, Any]:
    """Of all files the same."""
    return metadata


def lay_out(specs: Specs, metadata: Mapping[str, Any]) -> FileLayout:
    """The 8 bytes of its length and the JSON of the header, a multiple of 8 bytes; data follow at once."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    at = 0
    for name, spec in specs.items():
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        starts[name], at = at, at + spec.nbytes
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    return FileLayout(head, {name: len(head) + start for name, start in starts.items()}, len(head) + at)


def index(files: Mapping[str, Specs]) -> dict[str, Any]:
    """Total bytes, and the file of every tensor."""
    total = sum(spec.nbytes for specs in files.values() for spec in specs.values())
    return {"metadata": {"total_size": total}, "weight_map": {name: file for file, specs in files.items() for name in specs}}
