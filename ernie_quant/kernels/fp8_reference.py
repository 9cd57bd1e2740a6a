"""Float8 (e4m3) codes of blocks of 128 x 128 in plain torch: what the compiled `fp8` is held to, bit for bit."""

from __future__ import annotations

import math

import torch

from ernie_quant.kernels.rtn_reference import _sum_in_lanes, sum_in_order

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_SCALE = 2.0**-120  # a block below it is all but zero; 1 / scale must stay finite


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8 [out, in] and scales f32 [out / 128, in / 128] of a weight [out, in]."""
    scale = _blocks(weight.float()).abs().amax((1, 3)) / LARGEST
    scale = torch.where(scale >= SMALLEST_SCALE, scale, 1.0)
    return codes(weight, scale), scale


def codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8 [out, in] of weight / scale, rounded half to even."""
    ratio = (_blocks(weight.float()) / scale[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return ratio.to(torch.float8_e4m3fn).reshape(weight.shape)


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16(code * scale): bf16 [out, in]."""
    return (_blocks(codes.float()) * scale[:, None, :, None]).bfloat16().reshape(codes.shape)


def lost(weight: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float, float]:
    """||W - W'||^2, ||W||^2 and max |W - W'|: 128 inputs of a row in lanes, these in order, and the rows exactly."""
    x, w = (matrix.double().reshape(len(weight), -1, BLOCK) for matrix in (weight, decoded))
    error, energy = (sum_in_order(_sum_in_lanes(square)) for square in ((x - w).square(), x.square()))
    return math.fsum(error.tolist()), math.fsum(energy.tolist()), (weight.float() - decoded.float()).abs().max().item()


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    out, width = matrix.shape
    return matrix.reshape(out // BLOCK, BLOCK, width // BLOCK, BLOCK)
