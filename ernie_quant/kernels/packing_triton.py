"""`packing` for GPUs: a lane is a word."""

from __future__ import annotations

import torch
import triton.language as tl

from ernie_quant.kernels._triton import cdiv, jit, launch
from ernie_quant.kernels.packing import unpack as unpack  # shifts and masks of torch: the same on every device

WORDS = 256  # of a program


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`packing.pack`: int32 [out, ceil(in * bits / 32)] of int8 codes [out, in]; `bits` divides 32."""
    rows, columns = codes.shape
    width = cdiv(columns * bits, 32)
    words = torch.empty((rows, width), dtype=torch.int32, device=codes.device)
    launch(_pack, (rows, cdiv(width, WORDS)), codes.contiguous(), words, columns, width, bits, WORDS)
    return words


@jit
def _pack(codes, words, columns, width, BITS: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    per_word: tl.constexpr = 32 // BITS
    lowest: tl.constexpr = -(1 << (BITS - 1))
    word = tl.zeros((WORDS,), tl.int32)
    for k in tl.static_range(per_word):
        column = at * per_word + k
        code = tl.load(codes + row * columns + column, mask=column < columns, other=lowest)  # nothing is stored as 0
        word |= (code.to(tl.int32) - lowest) << (k * BITS)
    tl.store(words + row * width + at, word, mask=at < width)
