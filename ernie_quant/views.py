"""Make views of stored tensors, and read them.

The plan builds views; the run reads them in slabs of rows. A view has a shape and a dtype; `read(view, files, rows)`
returns `view[rows]` as a contiguous tensor and touches no other bytes than it must. Every layout difference between
Paddle, PT and tensor-parallel ranks is one of a few operations: transpose, cut, cat, and fold where rows are interleaved.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ernie_quant.checkpoint import ITEMSIZE, Extent, Stamp, TensorRef, TensorSpec
from ernie_quant.errors import CheckpointError
from ernie_quant.lazy import Cat, Cut, Decoded, Fold, Leaf, Readable, Same, T, Unfold, View

if TYPE_CHECKING:
    import torch

SLAB_BYTES = 32 << 20  # of source data: the unit of memory
TEXT_BLOCK = 1 << 16
CONTINUATION = bytes(range(0x80, 0xC0))  # second and later bytes of a UTF-8 character

Box: TypeAlias = tuple[tuple[int, int], ...]  # (start, stop) per dimension


def spec_of(view: View) -> TensorSpec:
    """Shape and dtype."""
    return TensorSpec(view.shape, view.dtype)


def fold(view: View, by: int) -> View:
    """`Fold`; of an unfolded view it is what that was made from."""
    if by == 1:
        return view
    return view.base if isinstance(view, Unfold) and view.by == by else Fold(view, by)


def unfold(view: View, by: int) -> View:
    """`Unfold`; of a folded view it is what that was made from."""
    if by == 1:
        return view
    return view.base if isinstance(view, Fold) and view.by == by else Unfold(view, by)


def leaf(ref: TensorRef) -> View:
    """The whole of a stored tensor, row-major."""
    return T(Leaf(ref)) if ref.fortran else Leaf(ref)


def transpose(view: View) -> View:
    """`view.T`; a double transposition vanishes, joints and cuts move outwards."""
    match view:
        case T(base):
            return base
        case Cat(parts, axis):
            return Cat(tuple(transpose(p) for p in parts), 1 - axis)
        case Same(copies):
            return Same(tuple(transpose(c) for c in copies))
        case Cut(base, axis, start, stop):
            return Cut(transpose(base), 1 - axis, start, stop)
    return T(view)


def cut(view: View, axis: int, start: int, stop: int) -> View:
    """`view[start:stop]` along `axis`; the whole is the view itself, a cut of a cut is one cut."""
    if (start, stop) == (0, view.shape[axis]):
        return view
    if isinstance(view, Cut) and view.axis == axis:
        return cut(view.base, axis, view.start + start, view.start + stop)
    return Cut(view, axis, start, stop)


def cat(parts: list[View], axis: int) -> View:
    """The parts joined along `axis`; neighbouring cuts of one view grow together, so split and cat cancel.

    Raises CheckpointError for parts of several dtypes: to join them would change one of them.
    """
    if odd := next((p for p in parts if p.dtype != parts[0].dtype), None):
        one, two = (f"{r.name} ({r.file.parent.name}/{r.file.name}) is {r.spec.dtype}" for r in (refs(parts[0])[0], refs(odd)[0]))
        raise CheckpointError(f"{one}, {two}: they are parts of one tensor and must have one dtype")
    joined: list[View] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Cat) and part.axis == axis:
            inner = cat([*joined, *part.parts], axis)
            joined = list(inner.parts) if isinstance(inner, Cat) and inner.axis == axis else [inner]
        elif isinstance(last, Cut) and isinstance(part, Cut) and last.base == part.base and last.axis == part.axis == axis:
            if last.stop == part.start:
                joined[-1] = cut(last.base, axis, last.start, part.stop)
            else:
                joined.append(part)
        else:
            joined.append(part)
    return joined[0] if len(joined) == 1 else Cat(tuple(joined), axis)


def same(copies: list[View]) -> View:
    """One tensor of which there are copies."""
    return copies[0] if len(copies) == 1 else Same(tuple(copies))


def refs(view: View) -> list[TensorRef]:
    """The stored tensors under a view, each once, in order."""
    match view:
        case Leaf(ref):
            return [ref]
        case Decoded(source):
            return list(dict.fromkeys(r for p in source.parts.values() for r in refs(p)))
        case T(base) | Cut(base) | Fold(base) | Unfold(base):
            return refs(base)
        case Cat(parts) | Same(parts):
            return list(dict.fromkeys(r for p in parts for r in refs(p)))


class Files:
    """Open files, read at offsets: safe for several threads, closed together.

    A file of which there is a stamp must be the one that was stamped, when it is opened and when `check` is called.
    `locate` tells where the bytes of a file lie, if not there.
    """

    def __init__(self, stamps: Mapping[Path, Stamp] | None = None, locate: Callable[[Path], Path] = lambda path: path) -> None:
        self._stamps, self._locate = stamps or {}, locate
        self._fds: dict[Path, int] = {}
        self._counts: dict[tuple[Path, Extent], list[int]] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def fd(self, path: Path) -> int:
        """The descriptor of `path`, opened on first use. Raises CheckpointError."""
        if path not in self._fds:
            try:
                fd = os.open(self._locate(path), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise CheckpointError(f"{path}: was there when the run began, and now: {error.strerror}") from None
            if path in self._stamps:
                try:
                    self._stamps[path].check(path, fd)
                except CheckpointError:
                    os.close(fd)
                    raise
            if self._fds.setdefault(path, fd) != fd:
                os.close(fd)  # another thread was first
        return self._fds[path]

    def check(self) -> None:
        """Are the files that were read still the same? Raises CheckpointError."""
        for path in self._fds.keys() & self._stamps.keys():
            self._stamps[path].check(path)

    def read_into(self, ref: TensorRef, buffer: memoryview, at: int) -> None:
        """Fill `buffer` from byte `at` of the tensor's payload. Raises CheckpointError."""
        for extent in ref.extents:
            if at < extent.nbytes and len(buffer):
                count = min(len(buffer), extent.nbytes - at)
                self._read_extent(ref, extent, buffer[:count], at)
                buffer, at = buffer[count:], 0
            else:
                at -= min(at, extent.nbytes)

    def _read_extent(self, ref: TensorRef, extent: Extent, buffer: memoryview, at: int) -> None:
        fd = self.fd(ref.file)
        if extent.latin1:
            buffer[:] = self._latin1(fd, ref, extent, at, at + len(buffer))
            return
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(fd, [buffer[done:]], extent.start + at + done)
            except OSError as error:
                raise CheckpointError(f"{ref.file}: {ref.name}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{ref.file.name}: {ref.name}: the file ended while it was read; it has changed")
            done += got

    def _latin1(self, fd: int, ref: TensorRef, extent: Extent, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a payload that pickle protocol 2 wraps as UTF-8, one or two bytes for each.

        No offset is known there; one pass counts the payload before every block, and the blocks needed are decoded.
        """
        if (ref.file, extent) not in self._counts:
            self._counts[ref.file, extent] = [0, *itertools.accumulate(self._count(fd, extent))]
        before = self._counts[ref.file, extent]
        if before[-1] != extent.nbytes:
            raise CheckpointError(f"{ref.file.name}: {ref.name}: its text holds {before[-1]} bytes, not {extent.nbytes}")
        first, last = bisect.bisect_right(before, start) - 1, bisect.bisect_left(before, stop)
        begin, end = first * TEXT_BLOCK, min(last * TEXT_BLOCK + 1, extent.stored)
        raw = os.pread(fd, end - begin, extent.start + begin)
        if first and raw[:1] and raw[0] in CONTINUATION:  # the second half of a byte of the block before
            raw = raw[1:]
        if end < extent.stored and raw[-1:] and raw[-1] not in CONTINUATION:  # the first byte of the block after
            raw = raw[:-1]
        try:
            data = raw.decode("utf-8").encode("latin-1")[start - before[first] : stop - before[first]]
        except UnicodeError:
            raise CheckpointError(f"{ref.file.name}: {ref.name}: its text is not latin-1 in UTF-8") from None
        if len(data) != stop - start:
            raise CheckpointError(f"{ref.file.name}: {ref.name}: the file ended while it was read; it has changed")
        return data

    @staticmethod
    def _count(fd: int, extent: Extent) -> Iterator[int]:
        """Bytes of payload that begin in each block of the text."""
        for at in range(0, extent.stored, TEXT_BLOCK):
            raw = os.pread(fd, min(TEXT_BLOCK, extent.stored - at), extent.start + at)
            yield len(raw.translate(None, CONTINUATION))


def slabs(spec: TensorSpec, multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of rows (multiples of `multiple`) of about SLAB_BYTES that together are the tensor; a scalar has one row."""
    step = max(1, SLAB_BYTES // max(1, row_bytes(spec)) // multiple) * multiple
    rows = spec.shape[0] if spec.shape else 1
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def row_bytes(spec: TensorSpec) -> int:
    """Bytes per row of the first dimension; of all, for a scalar."""
    return spec.nbytes // max(1, spec.shape[0]) if spec.shape else spec.nbytes


def read(view: View, files: Files, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """`view[rows[0]:rows[1]]`, contiguous; the rows of a scalar do not matter. Raises CheckpointError."""
    box = tuple((0, n) for n in view.shape)
    if rows is not None and box:
        box = (rows, *box[1:])
    return _read_box(view, files, box).contiguous()


def _read_box(view: View, files: Files, box: Box) -> torch.Tensor:
    import torch

    from ernie_quant.tensors import as_bytes

    match view:
        case T(base):
            return _read_box(base, files, box[::-1]).t()
        case Cut(base, axis, start, _):
            moved = list(box)
            moved[axis] = (box[axis][0] + start, box[axis][1] + start)
            return _read_box(base, files, tuple(moved))
        case Cat(parts, axis):
            found, at = [], 0
            for part in parts:
                first, last = max(box[axis][0] - at, 0), min(box[axis][1] - at, part.shape[axis])
                if first < last:
                    found.append(_read_box(part, files, (*box[:axis], (first, last), *box[axis + 1 :])))
                at += part.shape[axis]
            return found[0] if len(found) == 1 else torch.cat(found, dim=axis)
        case Same(copies):
            original = _read_box(copies[0], files, box)
            for copy in copies[1:]:
                if as_bytes(original) != as_bytes(_read_box(copy, files, box)):
                    one, other = (refs(c)[0] for c in (copies[0], copy))
                    where = " and ".join(f"{r.file.parent.name}/{r.file.name}" for r in (one, other))
                    raise CheckpointError(f"{one.name}: differs between {where}; every rank must have the same")
            return original
        case Fold(base, by):
            rows, columns = (box[0][0] * by, box[0][1] * by), (0, base.shape[1])
            folded = _read_box(base, files, (rows, columns)).reshape(-1, view.shape[1])
            return folded[:, box[1][0] : box[1][1]]
        case Unfold(base, by):
            rows, columns = (box[0][0] // by, -(-box[0][1] // by)), (0, base.shape[1])
            unfolded = _read_box(base, files, (rows, columns)).reshape(-1, view.shape[1])
            first = box[0][0] - rows[0] * by
            return unfolded[first : first + box[0][1] - box[0][0], box[1][0] : box[1][1]]
        case Decoded(source):
            return _read_decoded(source, files, box)
        case Leaf(ref):
            return _read_leaf(ref, view.shape, files, box)


def _read_decoded(source: Readable, files: Files, box: Box) -> torch.Tensor:
    """Slab after slab, so that a range of columns of a large matrix needs no more memory than a range of rows."""
    import torch

    (first, last), *columns = box
    found = []
    for start, stop in source.slabs():
        if start < last and stop > first:
            slab = source.read(files, (start, stop))[max(first - start, 0) : last - start]
            found.append(slab[:, columns[0][0] : columns[0][1]].clone() if columns else slab)
    return torch.cat(found) if len(found) != 1 else found[0]


def _read_leaf(ref: TensorRef, shape: tuple[int, ...], files: Files, box: Box) -> torch.Tensor:
    """Whole rows are one read; a range of columns is one read per row."""
    import torch

    from ernie_quant.tensors import TORCH_DTYPES, as_bytes

    size = tuple(stop - start for start, stop in box)
    out = torch.empty(size, dtype=TORCH_DTYPES[ref.spec.dtype])
    if not out.numel():
        return out
    buffer = as_bytes(out)
    itemsize = ITEMSIZE[ref.spec.dtype]
    if len(shape) != 2 or size[1] == shape[1]:
        row_bytes = (len(buffer) // size[0]) if size else len(buffer)
        files.read_into(ref, buffer, box[0][0] * row_bytes if size else 0)
        return out
    run = size[1] * itemsize
    for i, row in enumerate(range(*box[0])):
        files.read_into(ref, buffer[i * run : (i + 1) * run], (row * shape[1] + box[1][0]) * itemsize)
    return out
