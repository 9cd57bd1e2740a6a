"""From stored parameters to bf16 weights, written from the specifications alone.

compressed-tensors `pack-quantized`: element i of a row at bit i * bits of the row's int32 words, as code + 2^(bits-1).
"""

from __future__ import annotations

import torch

WORD = 32


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


def _times(values: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """Each scale for `width` inputs, rounded to bf16 once."""
    return (values * scale.repeat_interleave(width, -1)[..., : values.shape[-1]]).to(torch.bfloat16)
