"""Vectors written out: loops over inputs whose sums have a fixed order on every machine.

A compiler may not reorder a sum of floats, and so does not vectorize it. Here lane l of 16 sums the inputs 16 i + l, one after
the other, and the lanes are folded in halves at the end: lane l takes lane l + 8, then l + 4, l + 2, l + 1. Two vectors of 8
hold the lanes: additions that do not wait for each other, and registers that most processors have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ernie_quant.kernels._compiled import written_out

LANES, WIDTH = 16, 8
ROUND = 12582912.0  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even
FLOAT, DOUBLE, I8, I32 = ir.FloatType(), ir.DoubleType(), ir.IntType(8), ir.IntType(32)
FLOATS, DOUBLES, WORDS, BYTES = (ir.VectorType(kind, WIDTH) for kind in (FLOAT, DOUBLE, I32, I8))
TWO = types.UniTuple(types.float32, 2)  # type: ignore[no-untyped-call]

Code = Callable[..., Any]
Builder: TypeAlias = Any  # ir.IRBuilder


def splat(builder: Builder, one: ir.Value, kind: ir.VectorType = FLOATS) -> ir.Value:
    """The same number in all lanes."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, one, I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(WORDS, [0] * WIDTH))


def all_of(value: float, kind: ir.VectorType = FLOATS) -> ir.Value:
    """A constant in all lanes."""
    return ir.Constant(kind, [value] * WIDTH)


def larger(builder: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Lane by lane; b where a is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def smaller(builder: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Lane by lane; b where a is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def total(builder: Builder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Lane by lane."""
    return builder.fadd(a, b)


def magnitude(builder: Builder, a: ir.Value) -> ir.Value:
    """|a|."""
    return builder.bitcast(builder.and_(builder.bitcast(a, WORDS), all_of(0x7FFFFFFF, WORDS)), FLOATS)


def folded(builder: Builder, vector: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
    """One number of 8 lanes: halves, one on the other, three times."""
    n = WIDTH
    while n > 1:
        n //= 2
        halves = [ir.Constant(ir.VectorType(I32, n), list(range(first, first + n))) for first in (0, n)]
        vector = combine(builder, *(builder.shuffle_vector(vector, vector, half) for half in halves))
    return builder.extract_element(vector, I32(0))


def pointer(context: Any, builder: Builder, kind: Any, array: ir.Value) -> ir.Value:
    """To the first element of an array."""
    return cgutils.create_struct_proxy(kind)(context, builder, array).data  # type: ignore[no-untyped-call]


def load(builder: Builder, data: ir.Value, at: ir.Value, kind: ir.VectorType = FLOATS) -> ir.Value:
    """8 elements from `at` on."""
    loaded = builder.load(builder.bitcast(builder.gep(data, [at]), kind.as_pointer()))
    loaded.align = 4
    return loaded


def store(builder: Builder, vector: ir.Value, data: ir.Value, at: ir.Value) -> None:
    """8 elements from `at` on."""
    builder.store(vector, builder.bitcast(builder.gep(data, [at]), vector.type.as_pointer())).align = 1


def _kept(builder: Builder, vector: ir.Value) -> ir.Value:
    """A variable; LLVM finds a register for it."""
    return cgutils.alloca_once_value(builder, vector)  # type: ignore[no-untyped-call]


def accumulated(
    builder: Builder, blocks: ir.Value, begin: Sequence[Sequence[ir.Value]], step: Callable[..., Sequence[ir.Value]]
) -> list[list[ir.Value]]:
    """Vectors, for each half of the lanes, that start as `begin` and become `step(at, *vectors)`, `blocks` times."""
    places: list[list[ir.Value]] = [[_kept(builder, vector) for vector in half] for half in begin]
    with cgutils.for_range(builder, blocks) as loop:
        first = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
        for half, mine in enumerate(places):
            at = builder.add(first, ir.Constant(first.type, half * WIDTH))
            for place, vector in zip(mine, step(at, *map(builder.load, mine)), strict=True):
                builder.store(vector, place)
    return [[builder.load(place) for place in mine] for mine in places]


def summed(
    builder: Builder,
    blocks: ir.Value,
    step: Callable[..., Sequence[ir.Value]],
    how: Sequence[tuple[Callable[..., ir.Value], Any]],
) -> list[ir.Value]:
    """As `accumulated` from zeros on, and all lanes folded: a number for each way to combine, and its kind of vector."""
    halves = accumulated(builder, blocks, [[all_of(0.0, kind) for _, kind in how]] * 2, step)
    return [folded(builder, combine(builder, *both), combine) for (combine, _), *both in zip(how, *halves, strict=True)]


def square(builder: Builder, a: ir.Value) -> ir.Value:
    """Lane by lane."""
    return builder.fmul(a, a)


def code_of(builder: Builder, y: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """y within the range of codes and rounded, half to even; as floats."""
    within = smaller(builder, larger(builder, y, low), high)
    return builder.fsub(builder.fadd(within, all_of(ROUND)), all_of(ROUND))


def bf16(builder: Builder, x: ir.Value) -> ir.Value:
    """Rounded to bf16, half to even; as floats."""
    bits = builder.bitcast(x, WORDS)
    odd = builder.and_(builder.lshr(bits, all_of(16, WORDS)), all_of(1, WORDS))
    rounded = builder.and_(builder.add(builder.add(bits, all_of(0x7FFF, WORDS)), odd), all_of(0xFFFF0000, WORDS))
    return builder.bitcast(rounded, FLOATS)


@written_out
def bf16_of(typing: Any, x: Any) -> tuple[Any, Code]:
    """One f32 rounded to bf16, half to even, without a way through memory."""

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        bits = builder.bitcast(arguments[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        rounded = builder.and_(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(0xFFFF0000))
        return builder.bitcast(rounded, FLOAT)

    return types.float32(types.float32), code


def inputs(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
    """The first two arguments: an array, and where in it a group begins."""
    return builder.gep(pointer(context, builder, signature.args[0], arguments[0]), [arguments[1]])


@written_out
def extremes(typing: Any, x: Any, first: Any, blocks: Any) -> tuple[Any, Code]:
    """The smallest and the largest of 0 and f32 x[first : first + 16 * blocks]."""

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data = inputs(context, builder, signature, arguments)

        def step(at: ir.Value, low: ir.Value, high: ir.Value) -> list[ir.Value]:
            value = load(builder, data, at)
            return [smaller(builder, value, low), larger(builder, value, high)]

        return context.make_tuple(
            builder, signature.return_type, summed(builder, arguments[2], step, [(smaller, FLOATS), (larger, FLOATS)])
        )

    return TWO(x, types.intp, types.intp), code


@written_out
def squared_miss(typing: Any, x: Any, first: Any, blocks: Any, inverse: Any, low: Any, high: Any) -> tuple[Any, Code]:
    """|y - q|^2 for y = x * inverse of f32 x[first : first + 16 * blocks] and its codes q."""

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data = inputs(context, builder, signature, arguments)
        inverse, *ends = (splat(builder, one) for one in arguments[3:])

        def step(at: ir.Value, error: ir.Value) -> list[ir.Value]:
            y = builder.fmul(load(builder, data, at), inverse)
            return [builder.fadd(error, square(builder, builder.fsub(y, code_of(builder, y, *ends))))]

        return summed(builder, arguments[2], step, [(total, FLOATS)])[0]

    return types.float32(x, types.intp, types.intp, *[types.float32] * 3), code


@written_out
def least_squares(typing: Any, x: Any, first: Any, blocks: Any, inverse: Any, low: Any, high: Any) -> tuple[Any, Code]:
    """<x, q> and <q, q> for f32 x[first : first + 16 * blocks] and its codes q at the scale 1 / inverse."""

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data = inputs(context, builder, signature, arguments)
        inverse, *ends = (splat(builder, one) for one in arguments[3:])

        def step(at: ir.Value, with_x: ir.Value, with_itself: ir.Value) -> list[ir.Value]:
            value = load(builder, data, at)
            q = code_of(builder, builder.fmul(value, inverse), *ends)
            return [builder.fadd(with_x, builder.fmul(value, q)), builder.fadd(with_itself, square(builder, q))]

        return context.make_tuple(builder, signature.return_type, summed(builder, arguments[2], step, [(total, FLOATS)] * 2))

    return TWO(x, types.intp, types.intp, *[types.float32] * 3), code


@written_out
def finish(
    typing: Any, x: Any, first: Any, blocks: Any, scale: Any, inverse: Any, low: Any, high: Any, codes: Any
) -> tuple[Any, Code]:
    """Codes of f32 x[first : first + 16 * blocks] -> int8 codes[first : first + 16 * blocks].

    Returns |x - w|^2 and |x|^2, for what is decoded, w, in float64, and the largest |x - w|.
    """

    def code(context: Any, builder: Builder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data = inputs(context, builder, signature, arguments)
        out = builder.gep(pointer(context, builder, signature.args[7], arguments[7]), [arguments[1]])
        scale, inverse, *ends = (splat(builder, one) for one in arguments[3:7])

        def step(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            value = load(builder, data, at)
            q = code_of(builder, builder.fmul(value, inverse), *ends)
            store(builder, builder.trunc(builder.fptosi(q, WORDS), BYTES), out, at)
            return lost(builder, value, bf16(builder, builder.fmul(q, scale)), *sums)

        return context.make_tuple(builder, signature.return_type, summed(builder, arguments[2], step, LOST))

    return LOSS(x, types.intp, types.intp, *[types.float32] * 4, codes), code


def lost(builder: Builder, x: ir.Value, w: ir.Value, error: ir.Value, energy: ir.Value, largest: ir.Value) -> list[ir.Value]:
    """Sums of (x - w)^2 and x^2, in float64, as `difference.squares` has them, and the largest |x - w|."""
    exact = builder.fpext(x, DOUBLES)
    error = builder.fadd(error, square(builder, builder.fsub(exact, builder.fpext(w, DOUBLES))))
    return [error, builder.fadd(energy, square(builder, exact)), larger(builder, magnitude(builder, builder.fsub(x, w)), largest)]


LOST, LOSS = [(total, DOUBLES), (total, DOUBLES), (larger, FLOATS)], types.Tuple((types.float64, types.float64, types.float32))  # type: ignore[no-untyped-call]
