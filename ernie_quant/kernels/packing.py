"""Codes of a few bits side by side in int32 words, or two in a byte."""

from __future__ import annotations

import sys

import numpy as np
import torch

from ernie_quant.kernels._compiled import compiled


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [out, ceil(in * bits / 32)] of int8 codes [out, in]: element i at bit i * bits, as code + 2**(bits-1).

    The layout of compressed-tensors' pack_to_int32 (vllm-project/compressed-tensors, compressors/pack_quantized).
    `bits` divides 32.
    """
    rows, columns = codes.shape
    out = torch.empty((rows, -(-columns * bits // 32)), dtype=torch.int32)
    codes = codes.contiguous()
    if bits == 4 and columns % 8 == 0:
        _pack4(codes.view(torch.uint64).numpy(), out.view(torch.uint32).numpy())
    else:
        _pack(codes.numpy(), bits, out.numpy())
    return out


@compiled()
def _pack4(codes, out):  # type: ignore[no-untyped-def]
    """Eight codes at a time: the low nibbles of eight bytes move together in three steps."""
    offset, nibbles = np.uint64(0x0808080808080808), np.uint64(0x0F0F0F0F0F0F0F0F)
    pairs, fours = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
    for r in range(codes.shape[0]):
        for w in range(codes.shape[1]):
            # adding 8 to a nibble is flipping its top bit
            v = (codes[r, w] & nibbles) ^ offset
            v = (v | (v >> np.uint64(4))) & pairs
            v = (v | (v >> np.uint64(8))) & fours
            out[r, w] = np.uint32((v | (v >> np.uint64(16))) & np.uint64(0xFFFFFFFF))


@compiled()
def _pack(codes, bits, out):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    per_word, offset = 32 // bits, 1 << (bits - 1)
    for r in range(rows):
        for w in range(out.shape[1]):
            word = np.uint32(0)
            for k in range(min(per_word, columns - w * per_word)):
                word |= np.uint32(codes[r, w * per_word + k] + offset) << np.uint32(k * bits)
            out[r, w] = np.int32(word)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int8 codes [out, columns] of packed int32 words; the inverse of `pack`."""
    if bits > 2 and sys.byteorder == "little":  # whole bytes, in order
        bytes_ = packed.contiguous().view(torch.uint8)
        values = unpack_nibbles(bytes_) if bits == 4 else bytes_
        return values[:, :columns].contiguous().view(torch.int8) - (
            1 << (bits - 1)
        )  # 8 bits: 128 is -128, which wraps as it should
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return (values.reshape(packed.shape[0], -1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2] of uint8 codes below 16 [out, in]: even inputs in the low nibbles (compressed-tensors, nvfp4)."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 codes [out, in] of packed bytes; the inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def pack_reference(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack` in plain torch."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    words = (padded.reshape(codes.shape[0], -1, per_word) << torch.arange(0, 32, bits)).sum(-1)
    return (((words + 2**31) % 2**32) - 2**31).to(torch.int32)
