"""How much of a row WINT2's bytes explain at given scales: the inner loop of the search.

The 8 listed bytes of a vector of 4 weights lie side by side in a register, in whole numbers: two multiply-adds of pairs
(pmaddwd) score them, 8 vectors share a tree of maxima, and a table's line is a cache line. numba does not vectorize loops of
8, so the vectors are written out; LLVM makes of them what a processor has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ernie_quant.kernels._compiled import compiled, written_out
from ernie_quant.kernels._registers import I8, I32, WORDS, Builder, Code, folded, pointer, splat
from ernie_quant.kernels.ccq_lists import LAST_TWO, LINE, NORMS
from ernie_quant.kernels.ccq_reference import LISTED

F = np.float32
I16 = ir.IntType(16)
SIXTEEN, SIXTEEN_BYTES, SIXTEEN_HALVES = (ir.VectorType(kind, 2 * LISTED) for kind in (I32, I8, I16))
VECTORS = 16  # of 4 weights, in a group
# Lanes of two registers of which the larger are kept: after three steps one register holds the largest of each of eight.
STEPS = (
    ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    ([0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]),
)
BOTH = types.UniTuple(types.int32, 2)  # type: ignore[no-untyped-call]


def _lanes(builder: Builder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(WORDS, lanes))


def _load(builder: Builder, line: ir.Value, at: int, kind: ir.Type) -> ir.Value:
    loaded = builder.load(builder.bitcast(builder.gep(line, [I32(at)]), kind.as_pointer()))
    loaded.align = LISTED
    return loaded


def _products(builder: Builder, values: ir.Value, two: ir.Value) -> ir.Value:
    """a0 b0 + a1 b1 for int8 [8, 2] and two int16 in one int32; in this form LLVM knows it as one instruction."""
    pairs = builder.bitcast(splat(builder, two, WORDS), SIXTEEN_HALVES)
    products = builder.mul(builder.sext(values, SIXTEEN), builder.sext(pairs, SIXTEEN))
    even, odd = (_lanes(builder, products, products, list(range(first, 2 * LISTED, 2))) for first in (0, 1))
    return builder.add(even, odd)


def _scores(builder: Builder, lines: ir.Value, cell: ir.Value, x01: ir.Value, x23: ir.Value) -> ir.Value:
    """512 (x.p - |p|^2 / 2) of the 8 bytes of a cell: int32, exact."""
    line = builder.gep(lines, [builder.mul(builder.zext(cell, ir.IntType(64)), ir.IntType(64)(LINE))])
    first = _products(builder, _load(builder, line, 0, SIXTEEN_BYTES), x01)
    last = _products(builder, _load(builder, line, LAST_TWO, SIXTEEN_BYTES), x23)
    return builder.add(builder.add(first, _load(builder, line, NORMS, WORDS)), last)


def _larger(builder: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed(">", a, b), a, b)


def _largest_of_eight(builder: Builder, scores: list[ir.Value]) -> ir.Value:
    """Eight registers of eight -> the largest of each, in another order."""
    for low, high in STEPS:
        pairs = zip(scores[::2], scores[1::2], strict=True)
        scores = [_larger(builder, _lanes(builder, a, b, low), _lanes(builder, a, b, high)) for a, b in pairs]
    return scores[0]


@written_out
def explained(typing: Any, lines: Any, cell: Any, x01: Any, x23: Any, first: Any) -> tuple[Any, Code]:
    """512 times the sum of the largest scores of the 16 vectors from `first` on: int32, exact.

    lines int8 [CELLS * LINE]; cell, x01 and x23 int32 [in/4], of which the latter hold two int16 each.
    """

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        table, *arrays = [pointer(context, builder, *pair) for pair in zip(signature.args[:4], arguments[:4], strict=True)]
        arrays = [builder.gep(array, [arguments[4]]) for array in arrays]
        halves = []
        for half in range(0, VECTORS, 8):
            loaded = [[builder.load(builder.gep(array, [I32(half + v)])) for array in arrays] for v in range(8)]
            halves.append(_largest_of_eight(builder, [_scores(builder, table, *vector) for vector in loaded]))
        return folded(builder, builder.add(*halves), lambda builder, a, b: builder.add(a, b))

    return types.int32(lines, cell, x01, x23, types.intp), code


@written_out
def best_of_line(typing: Any, lines: Any, line: Any, x01: Any, x23: Any) -> tuple[Any, Code]:
    """512 times the largest score of the 8 bytes of a line, and its place there, of equals the first; line and x int32."""

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        scores = _scores(builder, pointer(context, builder, signature.args[0], arguments[0]), *arguments[1:])
        largest = folded(builder, scores, _larger)
        equal = builder.bitcast(builder.icmp_signed("==", scores, splat(builder, largest, WORDS)), ir.IntType(LISTED))
        place = builder.zext(builder.cttz(equal, ir.IntType(1)(1)), I32)
        return context.make_tuple(builder, signature.return_type, [largest, place])

    return BOTH(lines, types.int32, types.int32, types.int32), code


@written_out
def near_best(typing: Any, lines: Any, line: Any, x01: Any, x23: Any, least: Any) -> tuple[Any, Code]:
    """A bit for each of the 8 bytes of a line: is 512 times its score at least so much? Lowest bit first; all int32."""

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        scores = _scores(builder, pointer(context, builder, signature.args[0], arguments[0]), *arguments[1:4])
        above = builder.icmp_signed(">=", scores, splat(builder, arguments[4], WORDS))
        return builder.zext(builder.bitcast(above, ir.IntType(LISTED)), I32)

    return types.int32(lines, *[types.int32] * 4), code


@compiled()
def place(planes, scale, x, cell):  # type: ignore[no-untyped-def]
    """512 * planes / scale in whole numbers, and the cells in which they lie.

    planes f32 [2, in/2], the first and the last two weights of each vector, scale f32 [groups] -> x int16 [2, in/2], cell
    int32 [in/4].
    """
    for half in range(2):
        w, placed = planes[half], x[half]
        for g in range(scale.size):
            inverse = F(512) / scale[g] if scale[g] > 0 else F(0)
            for v in range(32 * g, 32 * g + 32):
                y = w[v] * inverse
                y = y if y < F(32767) else F(32767)
                y = y if y > F(-32767) else F(-32767)
                placed[v] = np.int16(np.rint(y))
    x01, x23 = x[0].view(np.int32), x[1].view(np.int32)
    for v in range(cell.size):
        a, b = _axis(np.int16(x01[v])), _axis(x01[v] >> 16)
        c, d = _axis(np.int16(x23[v])), _axis(x23[v] >> 16)
        cell[v] = (a << 9) | (b << 6) | (c << 3) | d


@compiled(inline="always")
def _axis(x):  # type: ignore[no-untyped-def]
    """How many edges of 8 is x, in units of 1/512, away from -32.5?"""
    edges = (np.int32(x) + np.int32(16640)) >> np.int32(12)
    return np.int32(min(max(edges, np.int32(0)), np.int32(7)))


@compiled()
def gains(x, cell, scale, lines, out):  # type: ignore[no-untyped-def]
    """Half of what the bytes explain of each group of a row that was placed at `scale`: -> out f64 [groups]."""
    x01, x23 = x[0].view(np.int32), x[1].view(np.int32)
    for g in range(scale.size):
        total = np.float64(explained(lines, cell, x01, x23, 16 * g)) * (1 / 512)
        out[g] = total * (np.float64(scale[g]) * np.float64(scale[g]))
