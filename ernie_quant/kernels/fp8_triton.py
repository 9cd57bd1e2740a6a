"""`fp8` for GPUs: a program is a block of 128 x 128.

Float8 is made by the integer arithmetic that torch has on the CPU: a GPU's own conversion is missing before compute
capability 8.9.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ernie_quant.kernels._triton import folded, jit, launch, lost, round_bf16, sums_of_rows, totals
from ernie_quant.kernels.fp8_reference import BLOCK
from ernie_quant.kernels.fp8_reference import decode as decode  # one product and one rounding: the same on every device

WARPS = 16
SIDE = tl.constexpr(BLOCK)
LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-120)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]:
    """`fp8.encode`: codes float8 [out, in] and scales f32 [out / 128, in / 128] of a weight [out, in]; what they lost."""
    weight, device = _taken(weight), weight.device
    rows, width = weight.shape
    blocks = (rows // BLOCK, width // BLOCK)
    scale = torch.empty(blocks, dtype=torch.float32, device=device)
    launch(_scales, blocks, weight, scale, width, num_warps=WARPS)
    codes = torch.empty((rows, width), dtype=torch.uint8, device=device)
    sums = torch.empty((2, blocks[1], rows), dtype=torch.float64, device=device)
    largest = torch.empty(blocks, dtype=torch.float32, device=device)
    launch(_codes_and_sums, blocks, weight, scale, codes, sums, largest, rows, width)
    return codes.view(torch.float8_e4m3fn), scale, totals(sums_of_rows(sums), largest)


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
    code, _ = _float8(x, tl.zeros((SIDE, SIDE), tl.float32) + scale)
    tl.store(codes + first + places, code.to(tl.uint8))


@jit
def _codes_and_sums(weight, scales, codes, sums, largest, rows, width):  # type: ignore[no-untyped-def]
    """16 inputs of each row at a time, each summed in a lane of its own, as `_registers` does."""
    row, first = tl.arange(0, SIDE)[None, :, None], _first(width)
    at = row * width + tl.arange(0, 16)[None, None, :]
    scale = tl.zeros((1, SIDE, 16), tl.float32) + tl.load(scales + _place_of_scale())
    error, energy = tl.zeros((1, SIDE, 16), tl.float64), tl.zeros((1, SIDE, 16), tl.float64)
    most = tl.zeros((1, SIDE, 16), tl.float32)
    for _ in range(SIDE // 16):
        x = tl.load(weight + first + at).to(tl.float32)
        code, q = _float8(x, scale)
        tl.store(codes + first + at, code.to(tl.uint8))
        error, energy, most = lost(x, round_bf16(q * scale), error, energy, most)
        at += 16
    # [2, blocks of a row, rows]
    place = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0) * SIDE + row
    tl.store(sums + place, folded(error))
    tl.store(sums + tl.num_programs(1).to(tl.int64) * rows + place, folded(energy))
    tl.store(largest + _place_of_scale(), tl.max(tl.max(tl.max(most, 2), 1), 0))


@jit
def _float8(x, scale):  # type: ignore[no-untyped-def]
    """Bits and value of the float8 nearest to x / scale, half to even (c10/util/Float8_e4m3fn.h)."""
    ratio = tl.div_rn(tl.abs(x), scale)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    y = tl.minimum(ratio, LARGEST)
    bits = y.to(tl.uint32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    raised = y + 16384.0  # below 2**-6 the steps are 2**-9: the last bit of 2**14
    small = y < 0.015625
    code = tl.where(small, raised.to(tl.uint32, bitcast=True) - 0x46800000, (normal - 0x3C000000) >> 20)
    code = tl.where(ratio == ratio, code, 0x7F) | (sign >> 24)
    value = tl.where(small, (raised - 16384.0).to(tl.uint32, bitcast=True), normal) | sign
    return code, value.to(tl.float32, bitcast=True)
