"""Float4 (e2m1) codes of groups of 16 inputs that share an e4m3 scale; codecs/nvfp4.py says which.

A group is read once: for its largest |w|, for the error of several scales, and for its codes and what they lose.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ernie_quant.kernels import nvfp4_reference as reference
from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._float4 import TABLE, finish, miss
from ernie_quant.kernels._registers import LANES
from ernie_quant.kernels.float4_reference import LARGEST
from ernie_quant.kernels.nvfp4_reference import FIRST, GROUP, LAST, ONE, TRIED
from ernie_quant.kernels.nvfp4_reference import codes as codes  # what is stored already is seldom read: torch is fast enough

F, U = np.float32, np.uint32
BESIDE = np.array(TRIED, np.int64)
LEAST_NORMAL = 2.0**-6


def encode(weight: torch.Tensor, global_scale: float) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]:
    """Codes uint8 [out, in] and scales uint8 [out, in / 16], the bits of e4m3, of a weight; what they lost, as `rtn.encode`.

    `global_scale`: a power of two, by which scales are divided.
    """
    half = weight.dtype == torch.bfloat16
    weight = weight.contiguous() if half else weight.float().contiguous()
    rows, width = weight.shape
    codes = torch.empty((rows, width), dtype=torch.uint8)
    scale = torch.empty((rows, width // GROUP), dtype=torch.uint8)
    sums, top = np.zeros((2, rows)), np.zeros(rows, F)
    bits = weight.view(torch.uint16 if half else torch.uint32).numpy()
    values = (reference.table() / global_scale).numpy()
    inverses = (reference.inverse_table() * global_scale).numpy()
    sixth = F(global_scale) / F(LARGEST)
    _encode(bits, U(16 if half else 0), BESIDE, values, inverses, sixth, codes.numpy(), scale.numpy(), sums, top)
    return codes, scale, (math.fsum(sums[0]), math.fsum(sums[1]), float(top.max(initial=0)))


@compiled()
def _encode(bits, shift, tried, values, inverses, sixth, codes, scales, sums, top):  # type: ignore[no-untyped-def]
    x, ideal = np.empty(GROUP, F), np.empty(1, F)
    words, of_ideal = x.view(np.uint32), ideal.view(np.uint32)
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            source, peak = bits[r, GROUP * g : GROUP * (g + 1)], U(0)
            for j in range(GROUP):  # larger numbers have larger bits, and NaN the largest
                words[j] = U(source[j]) << shift
            for j in range(GROUP):
                peak = max(peak, words[j] & U(0x7FFFFFFF))
            scale, best = np.int64(ONE), np.inf
            if peak > 0:
                of_ideal[0] = peak
                ideal[0] = ideal[0] * sixth
                below = np.int64(ideal[0] * F(512)) if ideal[0] < F(LEAST_NORMAL) else np.int64(of_ideal[0] >> U(20)) - 960
                for k in range(len(tried)):
                    trial = min(max(below + tried[k], FIRST), LAST)
                    error = np.float64(miss(x, 0, GROUP // LANES, inverses[trial]))
                    error = error * (np.float64(values[trial]) * np.float64(values[trial]))
                    if k == 0 or error < best:
                        scale, best = trial, error
            scales[r, g] = scale
            line = codes[r, GROUP * g : GROUP * (g + 1)]
            error, energy, largest = finish(x, 0, GROUP // LANES, values[scale], inverses[scale], line)
            sums[0, r] += error
            sums[1, r] += energy
            top[r] = max(top[r], largest)


def decode(codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """bf16 [out, in]: the value of a code times scale / global_scale; exact where that is a power of two."""
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    values = (reference.table() / global_scale).numpy()
    _decode(codes.contiguous().numpy(), scale.contiguous().numpy(), values, TABLE, out.view(torch.uint16).numpy())
    return out


@compiled()
def _decode(codes, scales, values, table, out):  # type: ignore[no-untyped-def]
    value = np.empty(GROUP, F)
    bits = value.view(np.uint32)
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            of_group = values[scales[r, g]]
            for j in range(GROUP):
                value[j] = table[codes[r, g * GROUP + j] & 15] * of_group
            for j in range(GROUP):  # to bf16, half to even
                out[r, g * GROUP + j] = np.uint16((bits[j] + U(0x7FFF) + ((bits[j] >> U(16)) & U(1))) >> U(16))
