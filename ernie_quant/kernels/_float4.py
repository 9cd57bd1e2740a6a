"""Float4 (e2m1) codes in vectors: what the kernels of mxfp4 and nvfp4 have in common. float4_reference has it in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ernie_quant.kernels._compiled import written_out
from ernie_quant.kernels._registers import (
    BYTES,
    FLOATS,
    LOSS,
    LOST,
    WORDS,
    all_of,
    inputs,
    load,
    lost,
    magnitude,
    pointer,
    smaller,
    splat,
    square,
    store,
    summed,
    total,
)
from ernie_quant.kernels.float4_reference import LARGEST, VALUES

STEP = 2.0**22  # float32 has steps of a half from here on, as e2m1 has below 1
TABLE = np.array([*VALUES, *(-value for value in VALUES)], np.float32)  # code -> its value


@written_out
def miss(typing: Any, x: Any, first: Any, blocks: Any, inverse: Any) -> tuple[Any, Any]:
    """|y - q|^2 for y = x * inverse of f32 x[first : first + 16 * blocks] and its codes q."""

    def code(context: Any, builder: Any, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data, inverse = inputs(context, builder, signature, arguments), splat(builder, arguments[3])

        def step(at: ir.Value, error: ir.Value) -> list[ir.Value]:
            y = builder.fmul(load(builder, data, at), inverse)
            return [builder.fadd(error, square(builder, builder.fsub(y, _nearest(builder, y)[1])))]

        return summed(builder, arguments[2], step, [(total, FLOATS)])[0]

    return types.float32(x, types.intp, types.intp, types.float32), code


@written_out
def finish(typing: Any, x: Any, first: Any, blocks: Any, scale: Any, inverse: Any, codes: Any) -> tuple[Any, Any]:
    """Codes of f32 x[first : first + 16 * blocks] -> uint8 codes, from their first on.

    Returns |x - w|^2 and |x|^2, for what is decoded, w, in float64, and the largest |x - w|.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data, out = inputs(context, builder, signature, arguments), pointer(context, builder, signature.args[5], arguments[5])
        scale, inverse = splat(builder, arguments[3]), splat(builder, arguments[4])

        def step(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            value = load(builder, data, at)
            byte, q = _nearest(builder, builder.fmul(value, inverse))
            store(builder, builder.trunc(byte, BYTES), out, at)
            return lost(builder, value, builder.fmul(q, scale), *sums)

        return context.make_tuple(builder, signature.return_type, summed(builder, arguments[2], step, LOST))

    return LOSS(x, types.intp, types.intp, types.float32, types.float32, codes), code


def _nearest(builder: Any, ratio: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The e2m1 nearest to each ratio, half to even, 6 where it is no number: as 32 bits, and as float32."""
    sign = builder.and_(builder.bitcast(ratio, WORDS), all_of(0x80000000, WORDS))
    y = smaller(builder, magnitude(builder, ratio), all_of(LARGEST))
    bits = builder.bitcast(y, WORDS)
    odd = builder.and_(builder.lshr(bits, all_of(22, WORDS)), all_of(1, WORDS))
    normal = builder.and_(builder.add(builder.add(bits, all_of(0x1FFFFF, WORDS)), odd), all_of(0xFFC00000, WORDS))
    raised = builder.fadd(y, all_of(STEP))
    is_small = builder.fcmp_ordered("<", y, all_of(1.0))
    small = builder.bitcast(builder.fsub(raised, all_of(STEP)), WORDS)
    q = builder.bitcast(builder.or_(builder.select(is_small, small, normal), sign), FLOATS)
    of_small = builder.sub(builder.bitcast(raised, WORDS), all_of(0x4A800000, WORDS))  # the bits of STEP
    of_normal = builder.sub(builder.lshr(normal, all_of(22, WORDS)), all_of(0xFC, WORDS))
    return builder.or_(builder.select(is_small, of_small, of_normal), builder.lshr(sign, all_of(28, WORDS))), q
