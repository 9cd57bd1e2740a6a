"""The nearest codes at the scales that blocks of ggml have already: where each code's bits lie, and what its steps are.

Layouts: ggml-org/llama.cpp, ggml/src/ggml-common.h. The steps are not computed from the scales: the decoder says what a block
is worth with all codes 0, and with all codes 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ernie_quant.dtypes import BLOCKS

UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl
TABLED = ("IQ4_NL", "IQ4_XS")
SIGNED = 128  # Q8_0's codes are int8: what turns one into the number that its bits are counted from


@dataclass(frozen=True)
class Piece:
    """Some bits of every code of a block: in which byte, from which bit of it on, how many, and which of the code's they are."""

    byte: torch.Tensor
    shift: torch.Tensor
    width: int
    of: int = 0


def _piece(n: int, place: Callable[[int], tuple[int, int]], width: int, of: int = 0) -> Piece:
    """`place`: element -> byte and bit."""
    places = torch.tensor([place(e) for e in range(n)])
    return Piece(places[:, 0], places[:, 1], width, of)


def _halves(at: int, group: int) -> Callable[[int], tuple[int, int]]:
    """Low nibbles hold the first half of a group, high ones the second."""
    return lambda e: (at + e // (2 * group) * group + e % group, e // group % 2 * 4)


def _quarters(at: int) -> Callable[[int], tuple[int, int]]:
    """Two bits each of four runs of 32 elements."""
    return lambda e: (at + e // 128 * 32 + e % 32, e // 32 % 4 * 2)


@cache
def pieces(dtype: str) -> tuple[Piece, ...]:
    """Where the codes of a block lie."""
    n = BLOCKS[dtype][0]
    match dtype:
        case "Q8_0":
            return (_piece(n, lambda e: (2 + e, 0), 8),)
        case "Q4_0" | "IQ4_NL":
            return (_piece(n, _halves(2, 16), 4),)
        case "Q5_0" | "Q5_1":
            at = 2 if dtype == "Q5_0" else 4
            return (_piece(n, _halves(at + 4, 16), 4), _piece(n, lambda e: (at + e // 8, e % 8), 1, 4))
        case "IQ4_XS":
            return (_piece(n, _halves(8, 16), 4),)
        case "Q4_K":
            return (_piece(n, _halves(16, 32), 4),)
        case "Q5_K":
            return (_piece(n, _halves(48, 32), 4), _piece(n, lambda e: (16 + e % 32, e // 32), 1, 4))
        case "Q6_K":
            low = lambda e: (e // 128 * 64 + e % 64, e // 64 % 2 * 4)  # noqa: E731
            return (_piece(n, low, 4), _piece(n, _quarters(128), 2, 4))
        case "Q3_K":
            return (_piece(n, _quarters(32), 2), _piece(n, lambda e: (e % 32, e // 32), 1, 2))
        case "Q2_K":
            return (_piece(n, _quarters(16), 2),)
    raise KeyError(dtype)


def codes_of(dtype: str, blocks: torch.Tensor) -> torch.Tensor:
    """int32 [blocks, elements], counted from 0, of uint8 [blocks, bytes]."""
    codes = torch.zeros((len(blocks), BLOCKS[dtype][0]), dtype=torch.int32)
    for piece in pieces(dtype):
        bits = blocks[:, piece.byte].int() >> piece.shift & ((1 << piece.width) - 1)
        codes |= bits << piece.of
    return codes ^ SIGNED if dtype == "Q8_0" else codes


def with_codes(dtype: str, blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The blocks with these codes, int32 [blocks, elements], in the place of theirs."""
    codes = codes ^ SIGNED if dtype == "Q8_0" else codes
    out = blocks.int()
    for piece in pieces(dtype):
        mask = (1 << piece.width) - 1
        taken = torch.zeros(blocks.shape[1], dtype=torch.int32).index_add_(0, piece.byte, (mask << piece.shift).int())
        bits = (codes >> piece.of & mask) << piece.shift
        out = (out & ~taken).index_add_(1, piece.byte, bits.int())
    return out.to(torch.uint8)


def recode(dtype: str, weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes]: the codes nearest to `weight` [rows, in]; those that are there where a scale is no number or 0."""
    elements, nbytes = BLOCKS[dtype]
    flat, wanted = blocks.reshape(-1, nbytes), weight.float().reshape(-1, elements)
    decode = importlib.import_module(f"ernie_quant.kernels.ggml_{dtype.lower()}").decode
    old, most = codes_of(dtype, flat), (1 << sum(piece.width for piece in pieces(dtype))) - 1
    lowest = decode(with_codes(dtype, flat, torch.zeros_like(old)))
    if dtype in TABLED:
        step = lowest / UNEVEN[0]
        table = torch.tensor(UNEVEN, dtype=torch.float32)
        codes = torch.bucketize(wanted / step, (table[1:] + table[:-1]) / 2)
    else:
        step = decode(with_codes(dtype, flat, torch.ones_like(old))) - lowest
        codes = ((wanted - lowest) / step).round().nan_to_num(0).clamp(0, most)
    codes = torch.where((step != 0) & step.isfinite(), codes.int(), old)
    return with_codes(dtype, flat, codes).reshape(blocks.shape)
