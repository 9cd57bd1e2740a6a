"""`ccq` for GPUs; formulas and reasons in ccq_reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl

from ernie_quant.kernels._triton import cdiv, jit, launch, round_bf16, upper_half
from ernie_quant.kernels.ccq_reference import GROUP, Pair, encodable, fields
from ernie_quant.kernels.ccq_search_triton import search

LANES = 256  # outputs of a program that decodes

Fields = dict[str, torch.Tensor]


def encode(weight: torch.Tensor, pairs: Sequence[Pair]) -> Fields:
    """`ccq.encode`: the fields of a weight [out, in] of any float dtype, in logical order."""
    stored = encodable(weight)
    encoded = fields(torch.empty(0), *search(stored, pairs), pairs)
    return encoded | {"codes": _nearest(stored, encoded, in_order=True)}


def decode(encoded: Fields) -> torch.Tensor:
    """`ccq.decode`: bf16 [out, in], in logical order."""
    codes = encoded["codes"].contiguous()
    rows, width = codes.shape[0], 4 * codes.shape[1]
    out = torch.empty((rows, width), dtype=torch.bfloat16, device=codes.device)
    launch(_decode, (rows, cdiv(width, LANES)), codes, *_scales(encoded), out.view(torch.int16), width, LANES)
    return out


def recode(weight: torch.Tensor, encoded: Fields) -> torch.Tensor:
    """`ccq.recode`: the bytes nearest to a weight [out, in] in logical order at the scales of `encoded`: uint8 [out, in/4]."""
    return _nearest((weight if weight.dtype == torch.bfloat16 else weight.float()).contiguous(), encoded, in_order=False)


def _nearest(weight: torch.Tensor, encoded: Fields, in_order: bool) -> torch.Tensor:
    """Bytes for a weight that is in stored order, or in logical order."""
    rows, width = weight.shape
    codes = torch.empty((rows, width // 4), dtype=torch.uint8, device=weight.device)
    launch(_nearest_bytes, (rows, width // GROUP), weight, *_scales(encoded), codes, width, in_order)
    return codes


def _scales(encoded: Fields) -> tuple[torch.Tensor, ...]:
    """Local scales uint8 [out, in/64], and super_scale, code_scale and code_zp f32 [out]."""
    names = ("super_scale", "code_scale", "code_zp")
    return encoded["local_scale"].contiguous(), *(encoded[name].float().contiguous() for name in names)


@jit
def _code(byte, code_scale, code_zp):  # type: ignore[no-untyped-def]
    """The 15 bits of a byte: the product is exact in float64 and the sum is rounded once."""
    sum_ = byte.to(tl.float64) * code_scale.to(tl.float64) + code_zp.to(tl.float64)
    return tl.floor(sum_.to(tl.float32) + 0.5).to(tl.int32)


@jit
def _decode(codes, local_scale, super_scale, code_scale, code_zp, out, width, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = at < width
    # logical input 8b + 2a + c of a group is at 16a + 2b + c of its bytes' values
    stored = at // 64 * 64 + at % 8 // 2 * 16 + at % 64 // 8 * 2 + at % 2
    byte = tl.load(codes + row * (width // 4) + stored // 4, mask=there, other=0)
    scale = round_bf16(
        tl.load(local_scale + row * (width // 64) + at // 64, mask=there, other=0).to(tl.float32) * tl.load(super_scale + row)
    )
    code = _code(byte, tl.load(code_scale + row), tl.load(code_zp + row))
    value = ((code >> (9 - stored % 4 * 3)) & 63) - 32
    tl.store(out + row * width + at, upper_half(round_bf16(value.to(tl.float32) * scale)), mask=there)


@jit
def _nearest_bytes(  # type: ignore[no-untyped-def]
    weight, local_scale, super_scale, code_scale, code_zp, codes, width, IN_ORDER: tl.constexpr
):
    """A program is a group: its 16 times 4 inputs against all 256 bytes, in float64; of equal distances the lowest byte."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = round_bf16(tl.load(local_scale + row * (width // 64) + group).to(tl.float32) * tl.load(super_scale + row))
    code = _code(tl.arange(0, 256), tl.load(code_scale + row), tl.load(code_zp + row))
    vector = tl.arange(0, 16)
    distance = tl.zeros((256, 16), tl.float64)
    for i in tl.static_range(4):
        decoded = round_bf16((((code >> (9 - 3 * i)) & 63) - 32).to(tl.float32) * scale)
        stored = 4 * vector + i
        at = stored if IN_ORDER else stored % 16 // 2 * 8 + stored // 16 * 2 + stored % 2
        x = tl.load(weight + row * width + group * 64 + at).to(tl.float32)
        e = x.to(tl.float64)[None, :] - decoded.to(tl.float64)[:, None]
        distance += e * e
    byte = tl.argmin(distance, 0, tie_break_left=True)
    tl.store(codes + row * (width // 4) + group * 16 + vector, byte.to(tl.uint8))
