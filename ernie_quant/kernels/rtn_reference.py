"""Round to nearest with a searched scale in plain torch: what the compiled `rtn` is held to, bit for bit."""

from __future__ import annotations

import torch

from ernie_quant.kernels._registers import LANES
from ernie_quant.kernels.rtn import SMALLEST, Array


def encode(
    weight: torch.Tensor, group: int, low: int, high: int, divisor: int, ratios: Array, refine: int, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rtn.encode` in plain torch, on any device."""
    x = weight.float().reshape(weight.shape[0], -1, group)
    top_high, top_low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
    top = torch.where(top_high > -top_low, -top_high, -top_low) if signed else torch.maximum(top_high, -top_low)
    scale = best = torch.empty(0)
    for k, ratio in enumerate(ratios.tolist()):
        trial = _scale(top * ratio / divisor)
        error = _error(x, trial, low, high)
        better = error < best if k else torch.ones_like(error, dtype=torch.bool)
        scale, best = (torch.where(better, trial, scale), torch.where(better, error, best)) if k else (trial, error)
    for _ in range(refine):
        q = _codes(x, scale, low, high)
        sum_xq, sum_qq = _sum_in_lanes(x * q), _sum_in_lanes(q * q)
        trial = _scale(torch.where(sum_qq > 0, sum_xq / sum_qq, 1.0))
        error = _error(x, trial, low, high)
        scale, best = torch.where(error < best, trial, scale), torch.where(error < best, error, best)
    codes = _codes(x, scale, low, high)
    return codes.to(torch.int8).reshape(weight.shape), scale.bfloat16()


def decode(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`rtn.decode` in plain torch."""
    groups = codes.float().reshape(*scale.shape, -1)
    return (groups * scale.float()[..., None]).bfloat16().reshape(codes.shape)


def _scale(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.bfloat16().float()
    return torch.where((scale.abs() >= float(SMALLEST)) & scale.isfinite(), scale, 1.0)


def _codes(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (x * (1.0 / scale)[..., None]).clamp(low, high).round()


def _error(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """|x - q scale|^2 in float64, from a sum in units of the scale."""
    miss = x * (1.0 / scale)[..., None] - _codes(x, scale, low, high)
    return _sum_in_lanes(miss.square()).double() * scale.double().square()


def _sum_in_lanes(values: torch.Tensor) -> torch.Tensor:
    """The last dimension, as _registers sums it: 16 lanes, each in order, then folded in halves."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % LANES))
    padded = padded.reshape(*values.shape[:-1], -1, LANES)
    lanes = torch.zeros_like(padded[..., 0, :])
    for block in padded.unbind(-2):
        lanes = lanes + block
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes[..., 0]


def sum_in_order(values: torch.Tensor) -> torch.Tensor:
    """The last dimension, first to last: rows lie side by side in the kernels that use it."""
    total = torch.zeros_like(values[..., 0])
    for j in range(values.shape[-1]):
        total += values[..., j]
    return total
