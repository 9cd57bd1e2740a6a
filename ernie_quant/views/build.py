"""Make views of stored tensors, and read them.

The plan builds views; the run reads them in slabs of rows. A view has a shape and a dtype; `read(view, files, rows)`
returns `view[rows]` as a contiguous tensor and touches no other bytes than it must. Every layout difference between
Paddle, PT and tensor-parallel ranks is one of a few operations: transpose, cut, cat, and fold where rows are interleaved.
"""

from __future__ import annotations

from ernie_quant.checkpoint import TensorRef
from ernie_quant.errors import CheckpointError
from ernie_quant.views.kinds import Cat, Cut, Decoded, Fold, Leaf, Pick, Readable, Replicated, T, Unfold, View


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
        case Replicated(copies):
            return Replicated(tuple(transpose(c) for c in copies))
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


def pick(view: View, index: int) -> View:
    """`view[index]`."""
    return Pick(view, index)


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


def replicated(copies: list[View]) -> View:
    """One tensor of which there are copies."""
    return copies[0] if len(copies) == 1 else Replicated(tuple(copies))


def refs(view: View) -> list[TensorRef]:
    """The stored tensors under a view, each once, in order."""
    match view:
        case Leaf(ref):
            return [ref]
        case Decoded(source):
            return list(dict.fromkeys(r for p in source.parts.values() for r in refs(p)))
        case T(base) | Cut(base) | Pick(base) | Fold(base) | Unfold(base):
            return refs(base)
        case Cat(parts) | Replicated(parts):
            return list(dict.fromkeys(r for p in parts for r in refs(p)))


def decoded(view: View) -> list[Readable]:
    """What under it is decoded when it is read, in order."""
    match view:
        case Decoded(source):
            return [source]
        case Leaf():
            return []
        case T(base) | Cut(base) | Pick(base) | Fold(base) | Unfold(base):
            return decoded(base)
        case Cat(parts) | Replicated(parts):
            return [source for part in parts for source in decoded(part)]


def decodes(view: View) -> bool:
    """Is anything under it decoded when it is read?"""
    return bool(decoded(view))
