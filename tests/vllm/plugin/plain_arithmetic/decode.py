"""From stored parameters to bf16 weights, written from the specifications alone.

compressed-tensors `pack-quantized`: element i of a row at bit i * bits of the row's int32 words, as code + 2^(bits-1).
`nvfp4-pack-quantized`: e2m1, the even input in the low nibble of a byte, bit 3 its sign; an e4m3 scale per 16 inputs.
"""

from __future__ import annotations

import torch

WORD = 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def integers(packed: torch.Tensor, scale: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """w = code * scale, [..., out, in], of int32 words [..., out, in * bits / 32] and scales [..., out, groups]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)
    if codes.shape[-1] != columns:
        raise ValueError(f"{codes.shape[-1]} codes in a row, but {columns} inputs")
    if columns % scale.shape[-1]:
        raise ValueError(f"{scale.shape[-1]} scales for {columns} inputs")
    values = (codes - (1 << bits - 1)).float()
    return _times(values, scale.float(), columns // scale.shape[-1])


def blocks(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """w = code * scale, [..., out, in], of float8 codes and one float32 scale per block x block."""
    tall, wide = (-(-side // block) for side in codes.shape[-2:])
    if scale.shape[-2:] != (tall, wide):
        raise ValueError(f"scales {tuple(scale.shape)} do not fit {tuple(codes.shape)} in blocks of {block}")
    rows = scale.float().repeat_interleave(block, -2)[..., : codes.shape[-2], :]
    return _times(codes.float(), rows, block)


def mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """w = code * 2^(v - 127), [..., out, in], of uint8 [..., out, in/2], the even input in the low nibble, and v of 32."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
    values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return _times(values, torch.exp2(scale.float() - 127), 32)


def wint2(packed: torch.Tensor, local: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """[..., out, in] of uint8 [..., out, in/4], two nibbles in uint8 [..., out, in/128], float32 [..., out, 3].

    A byte is four windows of 6 bits of floor(byte * code scale + code zero + 1/2); value 16a + 2b + c of 64 is input 8b + 2a + c.
    """
    super_scale, code_scale, code_zero = (column.unsqueeze(-1) for column in channel.double().unbind(-1))
    code = ((packed * code_scale + code_zero).float() + 0.5).floor().long()
    values = torch.stack([(code >> shift & 63) - 32 for shift in (9, 6, 3, 0)], -1)
    scale = torch.stack([local >> 4, local & 15], -1).flatten(-2).float() * super_scale.float()
    stored = _times(values.flatten(-2).float(), scale.to(torch.bfloat16).float(), 64)
    return stored.unflatten(-1, (-1, 4, 8, 2)).transpose(-2, -3).flatten(-4)


def float4(packed: torch.Tensor, scale: torch.Tensor, of_all: torch.Tensor) -> torch.Tensor:
    """w = code * scale * of_all, [..., out, in], of bytes [..., out, in / 2], scales [..., out, in / 16], numbers [...]."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    if nibbles.shape[-1] != 16 * scale.shape[-1]:
        raise ValueError(f"{scale.shape[-1]} scales for {nibbles.shape[-1]} inputs")
    if not (scale.float() > 0).all():
        raise ValueError("a scale that is not positive, which Marlin would not see")
    values = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    return _times(values, scale.float() * of_all.reshape(*of_all.shape, 1, 1), 16)


def _times(values: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """Each scale for `width` inputs, rounded to bf16 once."""
    return (values * scale.repeat_interleave(width, -1)[..., : values.shape[-1]]).to(torch.bfloat16)
