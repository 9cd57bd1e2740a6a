"""`weight_quantize` for GPUs, in torch operations: bytes are moved, and a few bits of them."""

from __future__ import annotations

import torch

from ernie_quant.kernels.weight_quantize import COLUMNS, check
from ernie_quant.kernels.weight_quantize import absmax_codes as absmax_codes


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight_quantize.pack`: int8 [out / 2, in] (4 bits) or [out, in] (8 bits) of int8 codes [out, in]."""
    check(codes.shape, bits)
    rows, columns = codes.shape
    u, together = codes.contiguous().view(torch.uint8), 16 // bits
    if bits == 4:
        halves = ((u & 0x0F) ^ 8).reshape(rows // 4, 4, columns // COLUMNS, 2, 2, 2, 8)  # adding 8 is flipping the top bit
        u = halves[..., 0, :] | (halves[..., 1, :] << 4)
    else:
        u = (u ^ 0x80).reshape(rows // 2, 2, columns // COLUMNS, 4, 2, 8)
    # [tiles of rows, row, tile, block, h, i] -> row after row in a tile, and byte 2i + h in a block
    packed = u.permute(0, 2, 1, 3, 5, 4).reshape(rows // together * columns // COLUMNS, -1)
    return packed.contiguous().view(torch.int8).reshape(rows * bits // 8, columns)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight_quantize.unpack`: int8 codes [out, in] of packed int8."""
    rows, columns = packed.shape[0] * 8 // bits, packed.shape[1]
    check((rows, columns), bits)
    together, blocks = 16 // bits, 2 if bits == 4 else 4
    u = packed.contiguous().view(torch.uint8).reshape(rows // together, columns // COLUMNS, together, blocks, 8, 2)
    u = u.permute(0, 2, 1, 3, 5, 4)
    u = torch.stack([u & 0x0F, u >> 4], 5) ^ 8 if bits == 4 else u ^ 0x80
    codes = u.reshape(rows, columns).contiguous().view(torch.int8)
    return torch.where(codes > 7, codes - 16, codes) if bits == 4 else codes
