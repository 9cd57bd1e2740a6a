"""Float4 (e2m1) codes of groups of 32 inputs that share a power of two; codecs/mxfp4.py says which.

A group is read once: for its largest |w|, for the error of three scales, and for its codes and what they lose.
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
from ernie_quant.kernels.mxfp4_reference import BIAS, EXPONENT_OF_LARGEST, FIRST, GROUP, LARGEST, LAST, TRIED, VALUES
from ernie_quant.kernels.mxfp4_reference import codes as codes  # what is stored already is seldom read: torch is fast enough

F, U = np.float32, np.uint32
STEP = 2.0**22  # float32 has steps of a half from here on, as e2m1 has below 1
TABLE = np.array([*VALUES, *(-value for value in VALUES)], F)
BESIDE = np.array(TRIED, np.int64)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]:
    """Codes uint8 [out, in] and scales uint8 [out, in / 32] of a weight [out, in]; what they lost, as `rtn.encode`."""
    half = weight.dtype == torch.bfloat16
    weight = weight.contiguous() if half else weight.float().contiguous()
    rows, width = weight.shape
    codes = torch.empty((rows, width), dtype=torch.uint8)
    scale = torch.empty((rows, width // GROUP), dtype=torch.uint8)
    sums, top = np.zeros((2, rows)), np.zeros(rows, F)
    bits = weight.view(torch.uint16 if half else torch.uint32).numpy()
    _encode(bits, U(16 if half else 0), BESIDE, codes.numpy(), scale.numpy(), sums, top)
    return codes, scale, (math.fsum(sums[0]), math.fsum(sums[1]), float(top.max(initial=0)))


@compiled()
def _encode(bits, shift, tried, codes, scales, sums, top):  # type: ignore[no-untyped-def]
    x = np.empty(GROUP, F)
    words = x.view(np.uint32)
    power = np.empty(2, F)
    exponents = power.view(np.uint32)
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            source, peak = bits[r, GROUP * g : GROUP * (g + 1)], U(0)
            for j in range(GROUP):  # larger numbers have larger bits, and NaN the largest
                words[j] = U(source[j]) << shift
            for j in range(GROUP):
                peak = max(peak, words[j] & U(0x7FFFFFFF))
            scale, best = BIAS, np.inf
            if peak > 0:
                for k in range(len(tried)):
                    trial = np.int64(peak >> U(23)) - EXPONENT_OF_LARGEST + tried[k]
                    trial = min(max(trial, FIRST), LAST)
                    exponents[0], exponents[1] = U(trial) << U(23), U(2 * BIAS - trial) << U(23)
                    error = np.float64(_miss(x, 0, GROUP // LANES, power[1])) * (np.float64(power[0]) * np.float64(power[0]))
                    if k == 0 or error < best:
                        scale, best = trial, error
            exponents[0], exponents[1] = U(scale) << U(23), U(2 * BIAS - scale) << U(23)
            scales[r, g] = scale
            line = codes[r, GROUP * g : GROUP * (g + 1)]
            error, energy, largest = _finish(x, 0, GROUP // LANES, power[0], power[1], line)
            sums[0, r] += error
            sums[1, r] += energy
            top[r] = max(top[r], largest)


@written_out
def _miss(typing: Any, x: Any, first: Any, blocks: Any, inverse: Any) -> tuple[Any, Any]:
    """|y - q|^2 for y = x * inverse of f32 x[first : first + 16 * blocks] and its codes q."""

    def code(context: Any, builder: Any, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        data, inverse = inputs(context, builder, signature, arguments), splat(builder, arguments[3])

        def step(at: ir.Value, error: ir.Value) -> list[ir.Value]:
            y = builder.fmul(load(builder, data, at), inverse)
            return [builder.fadd(error, square(builder, builder.fsub(y, _nearest(builder, y)[1])))]

        return summed(builder, arguments[2], step, [(total, FLOATS)])[0]

    return types.float32(x, types.intp, types.intp, types.float32), code


@written_out
def _finish(typing: Any, x: Any, first: Any, blocks: Any, scale: Any, inverse: Any, codes: Any) -> tuple[Any, Any]:
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


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16 [out, in]: the value of a code times its power of two, which is exact."""
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    _decode(codes.contiguous().numpy(), scale.contiguous().numpy(), TABLE, out.view(torch.uint16).numpy())
    return out


@compiled()
def _decode(codes, scales, table, out):  # type: ignore[no-untyped-def]
    power, value = np.empty(1, F), np.empty(GROUP, F)
    exponent, bits = power.view(np.uint32), value.view(np.uint32)
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            exponent[0] = U(scales[r, g]) << U(23) if scales[r, g] > 0 else U(1 << 22)
            for j in range(GROUP):
                value[j] = table[codes[r, g * GROUP + j] & 15] * power[0]
            for j in range(GROUP):
                out[r, g * GROUP + j] = np.uint16(bits[j] >> U(16))
