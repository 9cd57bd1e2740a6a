"""Paddle's `.pdparams`: a plain pickle of `{name: numpy array}`, read without unpickling.

Format: paddle.save of a state dict (PaddlePaddle, python/paddle/framework/io.py and io_utils.py). Arrays above
(2**30 - 1) // itemsize elements are split under protocols 2 and 3 (`NAME@@.0`, …, `UnpackBigParamInfor@@`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec
from ernie_quant.dtypes import ITEMSIZE
from ernie_quant.errors import CheckpointError
from ernie_quant.readers._pickle import walk
from ernie_quant.readers._pickle_machine import Call, Payload, Text

SUFFIXES = (".pdparams",)

ALLOWED = frozenset(
    {
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
        "builtins.tuple",
        "__builtin__.tuple",
        "collections.OrderedDict",
    }
)
# numpy's dtype letters; u2 holds bfloat16 bits
DTYPES = {
    "u2": "BF16", "f2": "F16", "f4": "F32", "f8": "F64",
    "i1": "I8", "u1": "U8", "i2": "I16", "i4": "I32", "i8": "I64", "b1": "BOOL",
}  # fmt: skip
NAMES_KEY = "StructuredToParameterName@@"
SPLIT_KEY = "UnpackBigParamInfor@@"


def read_header(path: Path) -> list[TensorRef]:
    """The arrays of one file, in file order."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        table = walk(file, path.name, size, ALLOWED)
    if isinstance(table, Call) and table.function == "collections.OrderedDict":
        table = table.state or {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name}: holds no dict of arrays")
    table.pop(NAMES_KEY, None)
    split = table.pop(SPLIT_KEY, {})
    refs = {name: _array(path, name, value) for name, value in table.items()}
    _join_split(path, refs, split)
    return list(refs.values())


def _array(path: Path, name: str, value: Any) -> TensorRef:
    """A ref from `_reconstruct(ndarray, (0,), b'b')` + BUILD (1, shape, dtype, is_fortran, bytes)."""
    match value:
        case Call(function=str(f), state=(int(), tuple(shape), Call(function="numpy.dtype") as dtype, bool(fortran), data)):
            if not f.endswith("._reconstruct"):
                raise CheckpointError(f"{path.name}: {name}: is not an array")
        case _:
            raise CheckpointError(f"{path.name}: {name}: is not an array")
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise CheckpointError(f"{path.name}: {name}: shape is not a list of at most 8 sizes")
    if fortran and len(shape) > 2:
        raise CheckpointError(f"{path.name}: {name}: has {len(shape)} dimensions in column-major order; save it contiguous")
    spec = TensorSpec(tuple(shape), _dtype(path, name, dtype))
    return TensorRef(name, spec, path, (_extent(path, name, spec, data),), fortran and len(shape) > 1)


def _dtype(path: Path, name: str, dtype: Call) -> str:
    match dtype:
        case Call(args=(str(letters), *_), state=(_, order, *_)) if letters in DTYPES and order in ("<", "|"):
            return DTYPES[letters]
    raise CheckpointError(f"{path.name}: {name}: its dtype is none of {', '.join(DTYPES)} (little-endian)")


def _extent(path: Path, name: str, spec: TensorSpec, data: Any) -> Extent:
    latin1 = isinstance(data, Call) and data.function == "_codecs.encode"
    if isinstance(data, Call) and latin1:
        data = data.args[0] if data.args and data.args[1:] == ("latin1",) else None
        data = data.payload if isinstance(data, Text) else data
    if not isinstance(data, Payload) or data.text != latin1:
        raise CheckpointError(f"{path.name}: {name}: its data are not a run of bytes in the file")
    # latin-1 text as UTF-8 takes one or two bytes per byte
    fits = spec.nbytes <= data.nbytes <= 2 * spec.nbytes if latin1 else data.nbytes == spec.nbytes
    if not fits:
        raise CheckpointError(
            f"{path.name}: {name}: {spec.dtype} {spec.shape} takes {spec.nbytes} bytes, the file holds {data.nbytes}"
        )
    return Extent(data.start, spec.nbytes, data.nbytes, latin1)


def _join_split(path: Path, refs: dict[str, TensorRef], split: Any) -> None:
    """Replace the slices of split arrays in `refs` by the whole."""
    if not isinstance(split, dict):
        raise CheckpointError(f"{path.name}: {SPLIT_KEY}: is not a dict")
    for name, info in split.items():
        match info:
            case {"OriginShape": (tuple() | list()) as shape, "slices": (tuple() | list()) as slices} if len(shape) <= 8:
                parts = [refs.pop(s, None) for s in slices if isinstance(s, str)]
            case _:
                raise CheckpointError(f"{path.name}: {SPLIT_KEY}: {name}: lacks OriginShape or slices")
        whole = [p for p in parts if p is not None and len(p.spec.shape) == 1]
        if not whole or len(whole) != len(slices) or not name.isprintable() or name in refs:
            raise CheckpointError(
                f"{path.name}: {name!r:.200}: one of its {len(slices)} slices is not there, or it is there whole"
            )
        if len({p.spec.dtype for p in whole}) > 1 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise CheckpointError(f"{path.name}: {name}: its slices have several dtypes, or its shape is not a list of sizes")
        spec = TensorSpec(tuple(shape), whole[0].spec.dtype)
        if sum(p.spec.nbytes for p in whole) != math.prod(spec.shape) * ITEMSIZE[spec.dtype]:
            raise CheckpointError(f"{path.name}: {name}: its slices do not add up to {spec.shape}")
        refs[name] = TensorRef(name, spec, path, tuple(p.extents[0] for p in whole))
