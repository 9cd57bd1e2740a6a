"""Float4 (e2m1) codes of groups of 32 with a power of two each, in plain torch: what the compiled `mxfp4` is held to."""

from __future__ import annotations

import torch

from ernie_quant.kernels import float4_reference as float4

GROUP = 32  # inputs that share a scale (OCP Microscaling Formats 1.0, 5.2)
BIAS = 127  # a scale v stands for 2**(v - 127)
EXPONENT_OF_LARGEST = 2  # 4 <= 6 < 8
# 2**-127 is a denormal of bf16, which programs that shift v into a bf16 take for 0; 6 x 2**126 is more than bf16 holds
FIRST, LAST = 1, 252
TRIED = (0, -1, 1)  # exponents beside that of the largest |w|; the first of equally good ones is taken


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [out, in], one in each byte, and scales uint8 [out, in / 32] of a weight [out, in]."""
    x = _groups(weight.float())
    peak = (x.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1)  # larger numbers have larger bits, and NaN the largest
    ideal = (peak >> 23) - EXPONENT_OF_LARGEST
    scale, best = torch.full_like(ideal, BIAS), torch.full(ideal.shape, torch.inf, dtype=torch.float64)
    for beside in TRIED:
        trial = (ideal + beside).clamp(FIRST, LAST)
        error = float4.error(x, _power(trial), _power(2 * BIAS - trial))
        better = (error < best) & (peak > 0)
        if beside == TRIED[0]:  # also where the error is none, for a NaN
            better = peak > 0
        scale, best = torch.where(better, trial, scale), torch.where(better, error, best)
    scale = scale.to(torch.uint8)
    return codes(weight, scale), scale


def codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] of weight / 2**(scale - 127), rounded half to even; what is larger than 6, or no number, becomes 6."""
    ratio = _groups(weight.float()) * _power(2 * BIAS - scale.int())[..., None]
    return float4.nearest(ratio).to(torch.uint8).reshape(weight.shape)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16 [out, in]: the value of a code times its power of two, which is exact."""
    return (_groups(float4.values(codes)) * _power(scale.int())[..., None]).bfloat16().reshape(codes.shape)


def _power(scale: torch.Tensor) -> torch.Tensor:
    """2**(scale - 127), f32, of int32 scales from 0 to 254."""
    return torch.where(scale > 0, scale << 23, 1 << 22).view(torch.float32)


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.reshape(len(matrix), -1, GROUP)
