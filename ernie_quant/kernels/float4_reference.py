"""Float4 (e2m1) codes in plain torch: what mxfp4 and nvfp4 have in common, and what the compiled `_float4` is held to."""

from __future__ import annotations

import torch

from ernie_quant.kernels.rtn_reference import _sum_in_lanes

LARGEST = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; bit 3 is the sign (OCP Microscaling Formats 1.0, 5.3.3)


def nearest(ratio: torch.Tensor) -> torch.Tensor:
    """int32 codes, half to even, 6 for what is larger or no number.

    Below 1 there are steps of a half, above it one bit of mantissa, as float32 has 23.
    """
    bits = ratio.contiguous().view(torch.int32)
    y = ratio.abs()
    y = torch.where(y < LARGEST, y, LARGEST)
    small = (y + 2.0**22).view(torch.int32) - 0x4A800000  # float32 has steps of a half from 2**22 on
    of_y = y.view(torch.int32)
    normal = ((of_y + 0x1FFFFF + ((of_y >> 22) & 1)) >> 22) - 0xFC
    return torch.where(y < 1, small, normal) | ((bits >> 28) & 8)


def values(codes: torch.Tensor) -> torch.Tensor:
    """f32: what codes stand for."""
    return torch.tensor([*VALUES, *(-value for value in VALUES)], device=codes.device)[codes.int()]


def error(x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """|x - q scale|^2 of the last dimension in float64, for the codes q of x * inverse, from a sum in units of the scale."""
    ratio = x * inverse[..., None]
    return _sum_in_lanes((ratio - values(nearest(ratio))).square()).double() * scale.double().square()
