"""Tensor-parallel ranks of stored tensors: what of each belongs to which rank, and how ranks make the whole again.

A rank has its share of the outputs of q, k, v, gate and up (of each of them), of the inputs of o_proj and down_proj, of the
rows of the vocabulary, and all of everything else (PaddlePaddle/FastDeploy, the tensor-parallel mappings of
ernie4_5_moe.py). Scales go with their outputs; where inputs are shared, every rank has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from ernie_quant import views
from ernie_quant.checkpoint import TensorRef, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import Keep
from ernie_quant.lazy import View
from ernie_quant.names import IN, OUT, size_of

if TYPE_CHECKING:
    from ernie_quant.stored import Stored

Dims = Mapping[str, int]
Piece = tuple[int, int, int]  # start, size, number of ranks that have different shares of it


def part_axes(target: ModuleType, name: str, codec: Codec, spec: TensorSpec, axis: int) -> dict[str, int | None]:
    """Along which of its axes each stored tensor grows with `axis` of the weight; None where it does not."""
    if not spec.shape:
        return dict.fromkeys(target.parts(name, codec, spec))
    shape = tuple(n * (128 if i == axis else 1) for i, n in enumerate(spec.shape))
    once, more = target.parts(name, codec, spec), target.parts(name, codec, TensorSpec(shape, spec.dtype))
    return {
        part: next((i for i, (a, b) in enumerate(zip(once[part].shape, more[part].shape, strict=True)) if a != b), None)
        for part in once
    }


def share(entry: Stored, part: str, rank: int, of: int, dims: Dims) -> View:
    """What of a stored tensor belongs to one of `of` ranks."""
    whole = entry.parts[part]
    axis, by = _axis(entry, part) if of > 1 else (None, 1)
    if axis is None:
        return whole
    folded = views.fold(whole, by)
    cuts = []
    for start, size, shares in _pieces(entry, folded.shape[axis], of, dims):
        width = size // shares
        first = start + rank * shares // of * width
        cuts.append(views.cut(folded, axis, first, first + width))
    return views.unfold(views.cat(cuts, axis), by)


def join(entry: Stored, part: str, copies: Sequence[TensorRef], dims: Dims) -> View:
    """The whole of a stored tensor, from every rank's share. Reading raises CheckpointError where copies differ."""
    leaves = [views.leaf(ref) for ref in copies]
    of = len(leaves)
    axis, by = _axis(entry, part) if of > 1 else (None, 1)
    if axis is None or len(leaves[0].shape) <= axis:
        return views.same(leaves)
    folded = [views.fold(leaf, by) for leaf in leaves]
    whole = folded[0].shape[axis] * of
    pieces = list(_pieces(entry, whole, of, dims))
    if any(shares != of for _, _, shares in pieces):  # kv heads that several ranks have
        pieces = list(_pieces(entry, _grown(folded[0].shape[axis], entry, of, dims), of, dims))
    joined, at = [], 0
    for _, size, shares in pieces:
        width = size // shares
        cuts = [views.cut(f, axis, at, at + width) for f in folded]
        alike = of // shares
        joined.append(views.cat([views.same(cuts[i : i + alike]) for i in range(0, of, alike)], axis))
        at += width
    return views.unfold(views.cat(joined, axis), by)


def _grown(share_size: int, entry: Stored, of: int, dims: Dims) -> int:
    """Size of the whole, where one rank's share has `share_size` and some pieces are had by several ranks."""
    total = sum(size_of(s, dims) for s in entry.rule.op.split)  # of the weight: the stored axis may be a fraction of it
    one = sum(size // shares for _, size, shares in _pieces(entry, total, of, dims))
    return share_size * total // one


def _axis(entry: Stored, part: str) -> tuple[int | None, int]:
    """The axis of a stored tensor that ranks share (None: all of it is everybody's), and how many rows it interleaves."""
    shared = entry.rule.ranks
    if shared is None:
        return None, 1
    if isinstance(entry.codec, Keep):
        flat = len(entry.shape) == 1
        return (0 if flat else 1 - shared if entry.rule.op.transpose else shared), 1
    axis = part_axes(entry.target, entry.name, entry.codec, entry.spec_of_codec, shared)[part]
    return axis, entry.target.interleave(entry.codec) if shared == IN and axis == 1 else 1


def _pieces(entry: Stored, total: int, of: int, dims: Dims) -> Iterator[Piece]:
    """The parts of a fused tensor (q, k, v or gate, up) along the shared axis, in units of that axis."""
    split = entry.rule.op.split if entry.rule.ranks == OUT else ()
    sizes = [size_of(s, dims) for s in split] or [1]
    at = 0
    for symbol, size in zip(split or ("",), sizes, strict=True):
        length = total * size // sum(sizes)
        yield at, length, min(of, dims["kv_heads"]) if symbol == "KV" else of
        at += length


def problems(entries: Sequence[Stored], of: int, dims: Dims, heads: int) -> list[str]:
    """Why weights cannot be shared by `of` ranks."""
    found = []
    kv_heads = dims["kv_heads"]
    if heads % of or (kv_heads % of and of % kv_heads):
        found.append(f"attention: {heads} heads and {kv_heads} kv heads cannot be shared by {of} ranks")
    for entry in entries:
        if entry.rule.ranks is None:
            continue
        for part, view in entry.parts.items():
            axis, by = _axis(entry, part)
            if axis is None:
                continue
            size = views.fold(view, by).shape[axis]
            if any(length % shares for _, length, shares in _pieces(entry, size, of, dims)):
                found.append(f"{part}: {size} along axis {axis} cannot be shared by {of} ranks")
        if not isinstance(entry.codec, Keep):
            found += entry.target.share_problems(entry.name, entry.codec, entry.shape, entry.rule.ranks, of)
    return found
