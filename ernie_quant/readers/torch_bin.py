"""PyTorch's `.bin`: a zip of a pickle and raw storages (the format of torch.save since 1.6), read without torch.

Format: pytorch/pytorch, caffe2/serialize/inline_container.h and torch/serialization.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec
from ernie_quant.dtypes import ITEMSIZE
from ernie_quant.errors import CheckpointError
from ernie_quant.readers import _zip
from ernie_quant.readers._pickle import walk
from ernie_quant.readers._pickle_machine import Call, Global

SUFFIXES = (".bin", ".pt")

STORAGES = {
    "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
}  # fmt: skip
REBUILD, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
ALLOWED = frozenset({REBUILD, PARAMETER, "collections.OrderedDict", *STORAGES})
MAX_PICKLE_BYTES = 1 << 28


def read_header(path: Path) -> list[TensorRef]:
    """The tensors of one file, in file order."""
    with open(path, "rb") as file:
        archive = _zip.open_archive(file, path.name, path.stat().st_size)
        if f"{archive.root}/byteorder" in archive.members:
            file.seek(archive.stored("byteorder").start)
            if file.read(6) != b"little":
                raise CheckpointError(f"{path.name}: was saved on a big-endian machine; save it again on another")
        pickled = archive.stored("data.pkl")
        if pickled.nbytes > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path.name}: data.pkl has {pickled.nbytes} bytes, more than any state dict")
        file.seek(pickled.start)
        table = walk(file, path.name, pickled.start + pickled.nbytes, ALLOWED)
        if isinstance(table, Call) and table.function == "collections.OrderedDict":
            table = table.state or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"{path.name}: holds no dict of tensors")
        storages: dict[str, Extent] = {}
        return [_tensor(path, archive, storages, name, value) for name, value in table.items()]


def _tensor(path: Path, archive: _zip.Archive, storages: dict[str, Extent], name: str, value: Any) -> TensorRef:
    """A ref from `_rebuild_tensor_v2(persistent storage, offset, shape, stride, …)`."""
    if isinstance(value, Call) and value.function == PARAMETER and value.args:
        value = value.args[0]
    match value:
        case Call(
            function="torch._utils._rebuild_tensor_v2",
            args=(
                Call(function="persistent", args=("storage", Global(name=kind), str(key), _, int())),
                int(offset), tuple(shape), tuple(stride), *_,
            ),
        ) if kind in STORAGES:  # fmt: skip
            pass
        case _:
            raise CheckpointError(f"{path.name}: {name}: is not a tensor of a known kind")
    if max(len(shape), len(stride)) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *stride, offset)):
        raise CheckpointError(f"{path.name}: {name}: shape, strides or offset are not at most 8 sizes")
    spec = TensorSpec(tuple(shape), STORAGES[kind])
    fortran = len(shape) == 2 and stride == (1, shape[0]) and 1 not in shape
    if not fortran and not _is_row_major(spec.shape, stride):
        raise CheckpointError(f"{path.name}: {name}: strides {stride} of shape {spec.shape}: save it contiguous")
    if key not in storages:
        storages[key] = archive.stored(f"data/{key}")
    start, total = offset * ITEMSIZE[spec.dtype], storages[key].nbytes
    if start + spec.nbytes > total:
        raise CheckpointError(f"{path.name}: {name}: ends at byte {start + spec.nbytes} of a storage of {total}")
    return TensorRef(name, spec, path, (Extent(storages[key].start + start, spec.nbytes),), fortran)


def _is_row_major(shape: tuple[int, ...], stride: tuple[Any, ...]) -> bool:
    if len(shape) != len(stride):
        return False
    step = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n > 1 and s != step:  # the stride of a dimension of 1 does not matter
            return False
        step *= max(n, 1)
    return True
