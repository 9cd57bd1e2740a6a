"""`fp8` for GPUs: a program is a block of 128 x 128.

Float8 is made by the integer arithmetic that torch has on the CPU: a GPU's own conversion is missing before compute
capability 8.9.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ernie_quant.kernels._triton import jit, launch
from ernie_quant.kernels.fp8 import BLOCK
from ernie_quant.kernels.fp8 import decode as decode  # one product and one rounding: the same on every device

WARPS = 16
SIDE = tl.constexpr(BLOCK)
LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-120)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp8.encode`: codes float8 [out, in] and scales f32 [out / 128, in / 128] of a bf16 or f32 weight [out, in]."""
    weight = _taken(weight)
    blocks = (weight.shape[0] // BLOCK, weight.shape[1] // BLOCK)
    scale = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    launch(_scales, blocks, weight, scale, weight.shape[1], num_warps=WARPS)
    return codes(weight, scale), scale


def codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`fp8.codes`: float8 [out, in] of weight / scale, rounded half to even."""
    weight = _taken(weight)
    out = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    launch(_codes, tuple(scale.shape), weight, scale.contiguous(), out, weight.shape[1], num_warps=WARPS)
    return out.view(torch.float8_e4m3fn)


def _taken(weight: torch.Tensor) -> torch.Tensor:
    return (weight if weight.dtype == torch.bfloat16 else weight.float()).contiguous()


@jit
def _first(width):  # type: ignore[no-untyped-def]
    """Where a program's block begins in a matrix of that width."""
    return tl.program_id(0).to(tl.int64) * SIDE * width + tl.program_id(1) * SIDE


@jit
def _places(width):  # type: ignore[no-untyped-def]
    """Of the elements of a block, from its first; 64 bits for each would not fit the registers."""
    return tl.arange(0, SIDE)[:, None] * width + tl.arange(0, SIDE)[None, :]


@jit
def _place_of_scale():  # type: ignore[no-untyped-def]
    return tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@jit
def _scales(weight, scales, width):  # type: ignore[no-untyped-def]
    x = tl.load(weight + _first(width) + _places(width)).to(tl.float32)
    numbers = tl.min(tl.min((x == x).to(tl.int32), 1), 0)  # 0 where there is a NaN, which a maximum may not show
    scale = tl.div_rn(tl.max(tl.max(tl.abs(x), 1), 0), LARGEST)
    tl.store(scales + _place_of_scale(), tl.where((scale >= SMALLEST_SCALE) & (numbers > 0), scale, 1.0))


@jit
def _codes(weight, scales, codes, width):  # type: ignore[no-untyped-def]
    first, places = _first(width), _places(width)
    x = tl.load(weight + first + places).to(tl.float32)
    scale = tl.load(scales + _place_of_scale())
    ratio = tl.div_rn(tl.abs(x), tl.zeros((SIDE, SIDE), tl.float32) + scale)
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    code = tl.where(ratio == ratio, _magnitude(tl.minimum(ratio, LARGEST)), 0x7F) | sign
    tl.store(codes + first + places, code.to(tl.uint8))


@jit
def _magnitude(x):  # type: ignore[no-untyped-def]
    """Exponent and mantissa of the float8 nearest to x in [0, 448], half to even (c10/util/Float8_e4m3fn.h)."""
    bits = x.to(tl.uint32, bitcast=True)
    # below 2**-6 the steps are 2**-9: the last bit of 2**14
    small = (x + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - 0x3C000000) >> 20
    return tl.where(x < 0.015625, small, normal)
