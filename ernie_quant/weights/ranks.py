"""Tensor-parallel ranks of stored tensors: what of each belongs to which rank, and how ranks make the whole again.

A rank has its share of the outputs of q, k, v, gate and up (of each of them), of the inputs of o_proj and down_proj, of the
rows of the vocabulary, and all of everything else (PaddlePaddle/FastDeploy, the tensor-parallel mappings of
ernie4_5_moe.py). Scales go with their outputs, those of a cache with its heads; where inputs are shared, every rank has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ernie_quant.names import OUT, Rule, Symbols, size_of
from ernie_quant.runtimes import Part
from ernie_quant.views import build
from ernie_quant.views.kinds import View

Dims = Mapping[str, int]
Piece = tuple[int, int, int]  # start, size, number of ranks that have different shares of it


@dataclass(frozen=True)
class Shares:
    """How ranks share a stored tensor: along which axis (None: all of it is everybody's), and what is fused along it.

    `interleave` rows take turns along the axis and are cut together.
    """

    axis: int | None = None
    interleave: int = 1
    split: Symbols = ()


WHOLE = Shares()


def shares_of(part: Part, rule: Rule, *, turned: bool) -> Shares:
    """The shares of one part of a weight; `turned`: the part is stored as [in, out]."""
    if rule.ranks is None:
        return WHOLE
    if part.outputs:
        return Shares(0, split=part.outputs)
    outputs = rule.ranks == OUT
    axis = part.out_axis if outputs != turned else part.in_axis
    return Shares(axis, 1 if outputs else part.interleave, rule.op.split if outputs else ())


def share(whole: View, shares: Shares, rank: int, of: int, dims: Dims) -> View:
    """What of a stored tensor belongs to one of `of` ranks."""
    axis, by = shares.axis, shares.interleave
    if axis is None or of == 1:
        return whole
    folded = build.fold(whole, by)
    cuts = []
    for start, size, number in _pieces(shares, folded.shape[axis], of, dims):
        width = size // number
        first = start + rank * number // of * width
        cuts.append(build.cut(folded, axis, first, first + width))
    return build.unfold(build.cat(cuts, axis), by)


def join(copies: Sequence[View], shares: Shares, dims: Dims) -> View:
    """The whole of a stored tensor, from every rank's share. Reading raises CheckpointError where copies differ."""
    axis, by, of = shares.axis, shares.interleave, len(copies)
    if of == 1 or axis is None or len(copies[0].shape) <= axis:
        return build.replicated(list(copies))
    folded = [build.fold(copy, by) for copy in copies]
    pieces = list(_pieces(shares, folded[0].shape[axis] * of, of, dims))
    if any(number != of for _, _, number in pieces):  # kv heads that several ranks have
        pieces = list(_pieces(shares, _grown(folded[0].shape[axis], shares, of, dims), of, dims))
    joined, at = [], 0
    for _, size, number in pieces:
        width = size // number
        cuts = [build.cut(f, axis, at, at + width) for f in folded]
        alike = of // number
        joined.append(build.cat([build.replicated(cuts[i : i + alike]) for i in range(0, of, alike)], axis))
        at += width
    return build.unfold(build.cat(joined, axis), by)


def divides(view: View, shares: Shares, of: int, dims: Dims) -> bool:
    """Has every rank a share of whole rows?"""
    if shares.axis is None:
        return True
    size = build.fold(view, shares.interleave).shape[shares.axis]
    return not any(length % number for _, length, number in _pieces(shares, size, of, dims))


def _grown(share_size: int, shares: Shares, of: int, dims: Dims) -> int:
    """Size of the whole, where one rank's share has `share_size` and some pieces are had by several ranks."""
    total = sum(size_of(s, dims) for s in shares.split)  # of the weight: the stored axis may be a fraction of it
    one = sum(size // number for _, size, number in _pieces(shares, total, of, dims))
    return share_size * total // one


def _pieces(shares: Shares, total: int, of: int, dims: Dims) -> Iterator[Piece]:
    """The parts of a fused tensor (q, k, v or gate, up) along the shared axis, in units of that axis."""
    sizes = [size_of(s, dims) for s in shares.split] or [1]
    at = 0
    for symbol, size in zip(shares.split or ("",), sizes, strict=True):
        length = total * size // sum(sizes)
        yield at, length, min(of, dims["kv_heads"]) if symbol == "KV" else of
        at += length
