"""The stored layout of `paddle.nn.quant.weight_quantize(w, algo, arch=80)`, FastDeploy's WINT4 and WINT8.

paddle describes it as four passes over the codes of w [in, out] (PaddlePaddle/Paddle,
phi/kernels/impl/weight_quantize_kernel_impl.h; here `pack_reference`). Together they do this to codes [out, in], with
unsigned codes u = code + 2**(bits-1):

8 bits: 16 inputs x of a row become 16 bytes, byte 2i + h = u[x[8h + i]].
4 bits: 32 inputs x of a row become 16 bytes, byte 2i + h = u[x[16h + i]] | u[x[16h + 8 + i]] << 4.
Then 2 rows (8 bits) or 4 rows (4 bits) lie one after the other in tiles of 64 inputs: row 0, tile 0; row 1, tile 0; ...

So ROWS rows are packed on their own: packing a slab of them gives those rows of packing the whole. Inputs are a
multiple of 64, outputs of 4; a caller's plan refuses other shapes by name.
"""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels._compiled import compiled

ROWS = 4  # a slab has a multiple of it; 8 bits would do with 2
COLUMNS = 64  # inputs of a tile; a rank's share of the inputs is a multiple of it


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [out / 2, in] (4 bits) or [out, in] (8 bits) of int8 codes [out, in]."""
    check(codes.shape, bits)
    rows, columns = codes.shape
    together = 16 // bits
    packed = torch.empty((rows * bits // 8, columns), dtype=torch.int8)
    tiles = packed.view(torch.uint8).numpy().reshape(rows // together, columns // COLUMNS, together, COLUMNS * bits // 8)
    (_pack4 if bits == 4 else _pack8)(codes.contiguous().view(torch.uint8).numpy(), tiles)
    return packed


@compiled()
def _pack4(codes, out):  # type: ignore[no-untyped-def]
    low, flip = np.uint8(0x0F), np.uint8(0x88)
    for r in range(codes.shape[0]):
        for t in range(out.shape[1]):
            row = out[r // 4, t, r % 4]
            for b in range(2):
                x = codes[r, 64 * t + 32 * b : 64 * t + 32 * b + 32]
                for i in range(8):
                    # adding 8 to a nibble is flipping its top bit
                    row[16 * b + 2 * i] = ((x[i] & low) | (x[8 + i] << 4)) ^ flip
                    row[16 * b + 2 * i + 1] = ((x[16 + i] & low) | (x[24 + i] << 4)) ^ flip


@compiled()
def _pack8(codes, out):  # type: ignore[no-untyped-def]
    flip = np.uint8(0x80)  # adding 128 to a byte
    for r in range(codes.shape[0]):
        for t in range(out.shape[1]):
            row = out[r // 2, t, r % 2]
            for b in range(4):
                x = codes[r, 64 * t + 16 * b : 64 * t + 16 * b + 16]
                for i in range(8):
                    row[16 * b + 2 * i] = x[i] ^ flip
                    row[16 * b + 2 * i + 1] = x[8 + i] ^ flip


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes [out, in] of packed int8; the inverse of `pack`."""
    rows, columns = packed.shape[0] * 8 // bits, packed.shape[1]
    check((rows, columns), bits)
    together = 16 // bits
    codes = torch.empty((rows, columns), dtype=torch.int8)
    tiles = packed.contiguous().view(torch.uint8).numpy()
    tiles = tiles.reshape(rows // together, columns // COLUMNS, together, COLUMNS * bits // 8)
    (_unpack4 if bits == 4 else _unpack8)(tiles, codes.numpy())
    return codes


@compiled()
def _unpack4(packed, codes):  # type: ignore[no-untyped-def]
    for r in range(codes.shape[0]):
        for t in range(packed.shape[1]):
            row = packed[r // 4, t, r % 4]
            for b in range(2):
                x = codes[r, 64 * t + 32 * b : 64 * t + 32 * b + 32]
                for i in range(8):
                    first, second = row[16 * b + 2 * i], row[16 * b + 2 * i + 1]
                    x[i] = np.int8(first & 0x0F) - np.int8(8)
                    x[8 + i] = np.int8(first >> 4) - np.int8(8)
                    x[16 + i] = np.int8(second & 0x0F) - np.int8(8)
                    x[24 + i] = np.int8(second >> 4) - np.int8(8)


@compiled()
def _unpack8(packed, codes):  # type: ignore[no-untyped-def]
    flip = np.uint8(0x80)
    for r in range(codes.shape[0]):
        for t in range(packed.shape[1]):
            row = packed[r // 2, t, r % 2]
            for b in range(4):
                x = codes[r, 64 * t + 16 * b : 64 * t + 16 * b + 16]
                for i in range(8):
                    x[i] = np.int8(row[16 * b + 2 * i] ^ flip)
                    x[8 + i] = np.int8(row[16 * b + 2 * i + 1] ^ flip)


def check(shape: tuple[int, ...], bits: int) -> None:
    """Of codes that can be packed."""
    assert bits in (4, 8), bits
    assert len(shape) == 2, shape
    assert shape[0] % ROWS == 0, shape
    assert shape[1] % COLUMNS == 0, shape


def pack_reference(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack` in plain torch: paddle's four passes, one by one."""
    rows, columns = codes.shape
    block, per_word, together = 128 // bits, 32 // bits, 16 // bits
    t = torch.arange(block)
    u = codes.long() + (1 << (bits - 1))
    u = u.reshape(rows, -1, block)[..., 8 * (t % per_word // 2) + t % 2 + 2 * (t // per_word)]
    u = u.reshape(rows // together, together, -1, COLUMNS).transpose(1, 2).reshape(-1, per_word)
    u = u[:, [0, 2, 1, 3] if bits == 8 else [0, 2, 4, 6, 1, 3, 5, 7]]
    u = (u.reshape(-1, 8 // bits) << torch.arange(0, 8, bits)).sum(-1)
    return u.to(torch.uint8).view(torch.int8).reshape(-1, columns)


def unpack_reference(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """`unpack` in plain torch: where `pack_reference` puts each code, read backwards."""
    rows, columns = packed.shape[0] * 8 // bits, packed.shape[1]
    together = 16 // bits
    u = (packed.view(torch.uint8).reshape(-1, 1).long() >> torch.arange(0, 8, bits)) & ((1 << bits) - 1)
    u = u.reshape(-1, 32 // bits)[:, [0, 2, 1, 3] if bits == 8 else [0, 4, 1, 5, 2, 6, 3, 7]]
    u = u.reshape(rows // together, -1, together, COLUMNS).transpose(1, 2).reshape(rows, columns)
    # position (a, b, c) of a block, b in fours (8 bits: twos), holds input 8b + 2a + c
    u = u.reshape(rows, -1, 4, 16 // bits, 2).transpose(2, 3).reshape(rows, columns)
    return (u - (1 << (bits - 1))).to(torch.int8)


def absmax_codes(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """paddle's own codes int8 [out, in] and scales [out, 1] of `dtype`, to the bit, of a weight [out, in].

    scale = dtype(max|w| / high), code = w / scale rounded half away from zero and clipped to +-high, in float32.
    A row of zeros has scale 0 and the code that paddle's arithmetic makes of 0 / 0. A scale that would underflow to
    0 is the smallest number of `dtype` instead: there paddle stores zeros for a row that is not zero.
    """
    high = 2 ** (bits - 1) - 1
    x = weight.float()
    top = x.abs().amax(1, keepdim=True)
    info = torch.finfo(dtype)
    # by a tensor: a GPU divides by a number of Python's by way of its reciprocal
    scale = (top / torch.full_like(top, high)).to(dtype).clamp_(min=info.smallest_normal * info.eps)
    ratio = (x / scale.float()).clamp_(-high, high)
    whole = ratio.trunc()
    rest = ratio.sub_(whole).mul_(2).trunc_()  # exact, where floor(|x| + 0.5) rounds .49999997 up
    codes = whole.add_(rest).to(torch.int8)
    zeros = top[:, 0] == 0
    codes[zeros], scale[zeros] = high if bits == 8 else -high, 0
    return codes, scale
