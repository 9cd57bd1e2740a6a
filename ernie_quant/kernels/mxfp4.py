"""Float4 (e2m1) codes of groups of 32 inputs that share a power of two; codecs/mxfp4.py says which.

A group is read once: for its largest |w|, for the error of three scales, and for its codes and what they lose.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._float4 import TABLE, finish, miss
from ernie_quant.kernels._registers import LANES
from ernie_quant.kernels.mxfp4_reference import BIAS, EXPONENT_OF_LARGEST, FIRST, GROUP, LAST, TRIED
from ernie_quant.kernels.mxfp4_reference import codes as codes  # what is stored already is seldom read: torch is fast enough

F, U = np.float32, np.uint32
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
                    error = np.float64(miss(x, 0, GROUP // LANES, power[1])) * (np.float64(power[0]) * np.float64(power[0]))
                    if k == 0 or error < best:
                        scale, best = trial, error
            exponents[0], exponents[1] = U(scale) << U(23), U(2 * BIAS - scale) << U(23)
            scales[r, g] = scale
            line = codes[r, GROUP * g : GROUP * (g + 1)]
            error, energy, largest = finish(x, 0, GROUP // LANES, power[0], power[1], line)
            sums[0, r] += error
            sums[1, r] += energy
            top[r] = max(top[r], largest)


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
