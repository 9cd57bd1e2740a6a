"""Float4 (e2m1) codes of groups of 16 with an e4m3 scale each, in plain torch: what the compiled `nvfp4` is held to.

Scales are bytes here: the bits of float8 e4m3fn, of which 1 to 126 are positive and finite, each the next larger number.
"""

from __future__ import annotations

import torch

from ernie_quant.kernels import float4_reference as float4

GROUP = 16  # inputs that share a scale
LARGEST_SCALE = 448.0  # of e4m3
FIRST, LAST, ONE = 1, 126, 56  # bytes: the least scale, the largest, and 1, which groups of zeros have
# steps of e4m3 beside the scale that puts the largest |w| at 6, or just above: about there, or about where it is coded as 4. Of a
# Gaussian -1 to 6 and more gain less than 0.2% of the error that these leave; the first of equally good ones is taken
TRIED = (0, 1, -1, 5, 6, 4, 2)


def encode(weight: torch.Tensor, global_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [out, in], one in each byte, and scales uint8 [out, in / 16] of a weight [out, in].

    w ~ code * scale / global_scale, which is a power of two.
    """
    x = _groups(weight.float())
    peak = (x.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1)  # larger numbers have larger bits, and NaN the largest
    ideal = below(peak.view(torch.float32) * torch.tensor(global_scale).div(float4.LARGEST))
    scale, best = torch.full_like(ideal, ONE), torch.full(ideal.shape, torch.inf, dtype=torch.float64)
    values, inverses = table(), inverse_table()
    for beside in TRIED:
        trial = (ideal + beside).clamp(FIRST, LAST)
        error = float4.error(x, values[trial] / global_scale, inverses[trial] * global_scale)
        better = (error < best) & (peak > 0)
        if beside == TRIED[0]:  # also where the error is none, for a NaN
            better = peak > 0
        scale, best = torch.where(better, trial, scale), torch.where(better, error, best)
    scale = scale.to(torch.uint8)
    return codes(weight, scale, torch.tensor([global_scale])), scale


def below(ideal: torch.Tensor) -> torch.Tensor:
    """int32: the byte of the largest e4m3 number that is no larger than each of f32 >= 0; more than LAST where there is more."""
    bits = ideal.contiguous().view(torch.int32)
    small = (ideal.clamp(max=1.0) * 512).int()  # below 2**-6 there are steps of 2**-9
    return torch.where(ideal < 2.0**-6, small, (bits >> 20) - 960)


def codes(weight: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] of weight * global_scale / scale, rounded half to even; what is larger than 6, or no number, becomes 6."""
    inverse = inverse_table().to(scale.device)[scale.int()] * global_scale
    return float4.nearest(_groups(weight.float()) * inverse[..., None]).to(torch.uint8).reshape(weight.shape)


def decode(codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """bf16 [out, in]: the value of a code times scale / global_scale; exact where that is a power of two."""
    of_group = table().to(scale.device)[scale.int()] / global_scale
    return (_groups(float4.values(codes)) * of_group[..., None]).bfloat16().reshape(codes.shape)


def table() -> torch.Tensor:
    """f32 [256]: what every byte stands for; two are NaN."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


def inverse_table() -> torch.Tensor:
    """f32 [256]: 1 / `table`, and 0 for 0, at which everything is coded as 0."""
    values = table()
    return torch.where(values == 0, 0.0, 1 / values)


def _groups(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.reshape(len(matrix), -1, GROUP)
