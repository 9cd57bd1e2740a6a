"""Read views: a box of a tensor at a time, and no other bytes than it must."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, TypeAlias

from ernie_quant.checkpoint import TensorRef, TensorSpec
from ernie_quant.devices import CPU, sent
from ernie_quant.dtypes import ITEMSIZE, as_bytes, torch_dtype
from ernie_quant.errors import CheckpointError
from ernie_quant.views.build import refs
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Cat, Cut, Decoded, Fold, Leaf, Pick, Readable, Replicated, T, Unfold, View

if TYPE_CHECKING:
    import torch


SLAB_BYTES = 32 << 20  # of source data: the unit of memory

Box: TypeAlias = tuple[tuple[int, int], ...]  # (start, stop) per dimension


def slabs(spec: TensorSpec, multiple: int = 1, nbytes: int | None = None) -> list[tuple[int, int]]:
    """Ranges of rows (multiples of `multiple`) of about `nbytes`, or SLAB_BYTES, that are all of it; a scalar has one."""
    step = max(1, (nbytes or SLAB_BYTES) // max(1, row_bytes(spec)) // multiple) * multiple
    rows = spec.shape[0] if spec.shape else 1
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def row_bytes(spec: TensorSpec) -> int:
    """Bytes per row of the first dimension; of all, for a scalar."""
    return spec.nbytes // max(1, spec.shape[0]) if spec.shape else spec.nbytes


def read(view: View, files: Files, rows: tuple[int, int] | None = None, device: str = CPU) -> torch.Tensor:
    """`view[rows[0]:rows[1]]`, contiguous, on `device`; the rows of a scalar do not matter. Raises CheckpointError."""
    box = tuple((0, n) for n in view.shape)
    if rows is not None and box:
        box = (rows, *box[1:])
    weight = _read_box(view, files, box, device)
    if weight.is_contiguous() or device != CPU:
        return weight.contiguous()
    return files.buffers.empty(tuple(weight.shape), weight.dtype).copy_(weight)


def _read_box(view: View, files: Files, box: Box, device: str) -> torch.Tensor:

    match view:
        case T(base):
            return _read_box(base, files, box[::-1], device).t()
        case Cut(base, axis, start, _):
            moved = list(box)
            moved[axis] = (box[axis][0] + start, box[axis][1] + start)
            return _read_box(base, files, tuple(moved), device)
        case Pick(base, index):
            return _read_box(base, files, ((index, index + 1), *box), device)[0]
        case Cat(parts, axis):
            pieces, at = [], 0
            for part in parts:
                first, last = max(box[axis][0] - at, 0), min(box[axis][1] - at, part.shape[axis])
                if first < last:
                    pieces.append(_read_box(part, files, (*box[:axis], (first, last), *box[axis + 1 :]), device))
                at += part.shape[axis]
            return pieces[0] if len(pieces) == 1 else _joined(pieces, axis)
        case Replicated(copies):
            original = _read_box(copies[0], files, box, device)
            for copy in copies[1:]:
                if as_bytes(original) != as_bytes(_read_box(copy, files, box, device)):
                    one, other = (refs(c)[0] for c in (copies[0], copy))
                    where = " and ".join(f"{r.file.parent.name}/{r.file.name}" for r in (one, other))
                    raise CheckpointError(f"{one.name}: differs between {where}; every rank must have the same")
            return original
        case Fold(base, by):
            rows, columns = (box[0][0] * by, box[0][1] * by), (0, base.shape[1])
            folded = _read_box(base, files, (rows, columns), device).reshape(-1, view.shape[1])
            return folded[:, box[1][0] : box[1][1]]
        case Unfold(base, by):
            rows, columns = (box[0][0] // by, -(-box[0][1] // by)), (0, base.shape[1])
            unfolded = _read_box(base, files, (rows, columns), device).reshape(-1, view.shape[1])
            first = box[0][0] - rows[0] * by
            return unfolded[first : first + box[0][1] - box[0][0], box[1][0] : box[1][1]]
        case Decoded(source):
            return _read_decoded(source, files, box, device)
        case Leaf(ref):
            return _read_leaf(ref, TensorSpec(view.shape, view.dtype), files, box, device)


def _joined(pieces: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Transposed matrices are joined as they lie in memory: what follows may want them so, or transposes them once."""
    import torch

    if all(piece.dim() == 2 and piece.t().is_contiguous() and not piece.is_contiguous() for piece in pieces):
        return torch.cat([piece.t() for piece in pieces], dim=1 - axis).t()
    return torch.cat(pieces, dim=axis)


def _read_decoded(source: Readable, files: Files, box: Box, device: str) -> torch.Tensor:
    """Slab after slab, so that a range of columns of a large matrix needs no more memory than a range of rows."""
    import torch

    (first, last), *columns = box
    pieces = []
    for start, stop in source.slabs():
        if start < last and stop > first:
            slab = source.read(files, (start, stop), device)[max(first - start, 0) : last - start]
            pieces.append(slab[:, columns[0][0] : columns[0][1]].clone() if columns else slab)
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _read_leaf(ref: TensorRef, spec: TensorSpec, files: Files, box: Box, device: str) -> torch.Tensor:
    """One read for every run of bytes: whole rows are one, a range of columns is one per row. `spec`: of what lies there."""
    shape = spec.shape
    size = tuple(stop - start for start, stop in box)
    out = files.buffers.empty(size, torch_dtype(spec.dtype), device)
    if out.numel():
        bytes_ = as_bytes(out)
        # the last axis of which not all is wanted: what lies below it is contiguous
        cut = max((axis for axis in range(len(shape)) if size[axis] != shape[axis]), default=0)
        strides = [ITEMSIZE[spec.dtype] * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        run = len(bytes_) // math.prod(size[:cut])
        begin = box[cut][0] * strides[cut] if box else 0
        for i, outer in enumerate(itertools.product(*(range(*axis) for axis in box[:cut]))):
            at = begin + sum(n * stride for n, stride in zip(outer, strides[:cut], strict=True))
            files.read_into(ref, bytes_[i * run : (i + 1) * run], at)
    return sent(out, device)
