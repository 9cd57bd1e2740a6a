"""Float8 (e4m3) codes of blocks of 128 x 128; codecs/fp8.py says which.

A block is read twice: for its scale, and row by row while it lies in the first cache, for its codes and what they lose.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from ernie_quant.kernels._compiled import compiled, written_out
from ernie_quant.kernels._registers import (
    BYTES,
    FLOATS,
    LANES,
    LOSS,
    LOST,
    WORDS,
    all_of,
    bf16,
    inputs,
    load,
    lost,
    magnitude,
    pointer,
    smaller,
    splat,
    store,
    summed,
)
from ernie_quant.kernels.fp8_reference import BLOCK, LARGEST, SMALLEST_SCALE
from ernie_quant.kernels.fp8_reference import codes as codes  # what is stored already is seldom read: torch is fast enough
from ernie_quant.kernels.fp8_reference import decode as decode

F = np.float32
STEP = 2.0**14  # float32 from here on has steps of 2**-9, as float8 has below 2**-6


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]:
    """Codes float8 [out, in] and scales f32 [out / 128, in / 128] of a weight [out, in]; what they lost, as `rtn.encode`."""
    half = weight.dtype == torch.bfloat16
    weight = weight.contiguous() if half else weight.float().contiguous()
    rows, width = weight.shape
    codes = torch.empty((rows, width), dtype=torch.uint8)
    scale = torch.empty((rows // BLOCK, width // BLOCK), dtype=torch.float32)
    sums, top = np.zeros((2, rows)), np.zeros(rows, F)
    bits, magnitude = (np.uint16, 0x7FFF) if half else (np.uint32, 0x7FFFFFFF)
    _encode(
        weight.view(torch.uint16 if half else torch.uint32).numpy(),
        np.uint32(16 if half else 0),
        bits(magnitude),
        codes.numpy(),
        scale.numpy(),
        sums,
        top,
    )
    return codes.view(torch.float8_e4m3fn), scale, (math.fsum(sums[0]), math.fsum(sums[1]), float(top.max(initial=0)))


@compiled()
def _encode(bits, shift, magnitude, codes, scales, sums, top):  # type: ignore[no-untyped-def]
    x = np.empty(BLOCK, F)
    words = x.view(np.uint32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scale = _scale(bits, shift, magnitude, BLOCK * i, BLOCK * j)
            scales[i, j] = scale
            for r in range(BLOCK * i, BLOCK * i + BLOCK):
                source = bits[r, BLOCK * j : BLOCK * j + BLOCK]
                for c in range(BLOCK):
                    words[c] = np.uint32(source[c]) << shift
                error, energy, largest = _finish(x, 0, BLOCK // LANES, scale, codes[r, BLOCK * j : BLOCK * j + BLOCK])
                sums[0, r] += error
                sums[1, r] += energy
                top[r] = max(top[r], largest)


@compiled()
def _scale(bits, shift, magnitude, row, column):  # type: ignore[no-untyped-def]
    """max|w| / 448 of a block; 1 where that is too small, or a number is none."""
    peak, one = magnitude - magnitude, np.empty(1, F)
    for r in range(row, row + BLOCK):
        source = bits[r, column : column + BLOCK]
        for c in range(BLOCK):  # larger numbers have larger bits, and NaN the largest
            peak = max(peak, source[c] & magnitude)
    one.view(np.uint32)[0] = np.uint32(peak) << shift
    scale = one[0] / F(LARGEST)
    return scale if scale >= F(SMALLEST_SCALE) else F(1)


@written_out
def _finish(typing: Any, x: Any, first: Any, blocks: Any, scale: Any, codes: Any) -> tuple[Any, Any]:
    """Codes of f32 x[first : first + 16 * blocks] -> uint8 codes, from their first on.

    Returns |x - w|^2 and |x|^2, for what is decoded, w, in float64, and the largest |x - w|.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data, out = inputs(context, builder, signature, arguments), pointer(context, builder, signature.args[4], arguments[4])
        scale = splat(builder, arguments[3])

        def step(at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            value = load(builder, data, at)
            byte, q = _nearest(builder, builder.fdiv(value, scale))
            store(builder, builder.trunc(byte, BYTES), out, at)
            return lost(builder, value, bf16(builder, builder.fmul(q, scale)), *sums)

        return context.make_tuple(builder, signature.return_type, summed(builder, arguments[2], step, LOST))

    return LOSS(x, types.intp, types.intp, types.float32, codes), code


def _nearest(builder: Any, ratio: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The float8 nearest to each ratio, half to even, as c10/util/Float8_e4m3fn.h makes it: as 32 bits, and as float32."""
    sign = builder.and_(builder.bitcast(ratio, WORDS), all_of(0x80000000, WORDS))
    y = smaller(builder, all_of(LARGEST), magnitude(builder, ratio))  # a NaN stays one
    bits = builder.bitcast(y, WORDS)
    odd = builder.and_(builder.lshr(bits, all_of(20, WORDS)), all_of(1, WORDS))
    normal = builder.and_(builder.add(builder.add(bits, all_of(0x7FFFF, WORDS)), odd), all_of(0xFFF00000, WORDS))
    raised = builder.fadd(y, all_of(STEP))
    is_small = builder.fcmp_ordered("<", y, all_of(2.0**-6))
    small = builder.bitcast(builder.fsub(raised, all_of(STEP)), WORDS)
    q = builder.bitcast(builder.or_(builder.select(is_small, small, normal), sign), FLOATS)
    of_small = builder.sub(builder.bitcast(raised, WORDS), all_of(0x46800000, WORDS))  # the bits of STEP
    of_normal = builder.lshr(builder.sub(normal, all_of(0x3C000000, WORDS)), all_of(20, WORDS))
    byte = builder.select(is_small, of_small, of_normal)
    byte = builder.select(builder.fcmp_unordered("uno", y, y), all_of(0x7F, WORDS), byte)
    return builder.or_(byte, builder.lshr(sign, all_of(24, WORDS))), q
