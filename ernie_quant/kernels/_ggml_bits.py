"""Where the bits of codes lie in blocks of ggml, and the loops that put them there and take them out.

Layouts: ggml-org/llama.cpp, ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ernie_quant.dtypes import BLOCKS
from ernie_quant.kernels._compiled import compiled

Array = np.ndarray[Any, Any]
SIGNED = 128  # Q8_0's codes are int8: what turns one into the number that its bits are counted from
ALL = 0xFF
RUN = 16  # elements that are shifted alike: the compiler takes them all at once


@dataclass(frozen=True)
class Piece:
    """Some bits of every code of a block: in which byte, from which bit of it on, how many, and which of the code's they are."""

    byte: Array
    shift: Array
    width: int
    of: int = 0

    @property
    def in_runs(self) -> bool:
        """Whether RUN elements in a row are at one place of bytes in a row."""
        byte, shift = self.byte.reshape(-1, RUN), self.shift.reshape(-1, RUN)
        return bool((byte == byte[:, :1] + np.arange(RUN)).all() and (shift == shift[:, :1]).all())


def _piece(n: int, place: Callable[[int], tuple[int, int]], width: int, of: int = 0) -> Piece:
    """`place`: element -> byte and bit."""
    places = np.array([place(e) for e in range(n)])
    return Piece(places[:, 0].copy(), places[:, 1].astype(np.uint8), width, of)


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
            low = _piece(n, lambda e: (e // 128 * 64 + e % 64, e // 64 % 2 * 4), 4)
            return (low, _piece(n, _quarters(128), 2, 4))
        case "Q3_K":
            return (_piece(n, _quarters(32), 2), _piece(n, lambda e: (e % 32, e // 32), 1, 2))
        case "Q2_K":
            return (_piece(n, _quarters(16), 2),)
    raise KeyError(dtype)


def codes_of(dtype: str, blocks: Array) -> Array:
    """uint8 [blocks, elements], counted from 0, of uint8 [blocks, bytes]."""
    codes = np.zeros((len(blocks), BLOCKS[dtype][0]), np.uint8)
    for piece in pieces(dtype):
        take = _take_runs if piece.in_runs else _take
        take(blocks, piece.byte, piece.shift, np.uint8((1 << piece.width) - 1), np.uint8(piece.of), codes)
    return codes ^ np.uint8(SIGNED) if dtype == "Q8_0" else codes


def put_codes(dtype: str, codes: Array, blocks: Array) -> None:
    """Write codes, uint8 [blocks, elements] counted from 0, in the place of those of uint8 [blocks, bytes]."""
    if dtype == "Q8_0":
        codes = codes ^ np.uint8(SIGNED)
    for piece in pieces(dtype):
        mask = np.uint8((1 << piece.width) - 1)
        taken = np.zeros(blocks.shape[1], np.uint8)
        np.bitwise_or.at(taken, piece.byte, mask << piece.shift)
        put = _put_runs if piece.in_runs else _put
        put(codes, piece.byte, piece.shift, mask, np.uint8(piece.of), taken ^ np.uint8(ALL), blocks)


@compiled()
def _take(blocks, byte, shift, mask, of, codes):  # type: ignore[no-untyped-def]
    for b in range(len(blocks)):
        for e in range(codes.shape[1]):
            codes[b, e] |= ((blocks[b, byte[e]] >> shift[e]) & mask) << of


@compiled()
def _put(codes, byte, shift, mask, of, left, blocks):  # type: ignore[no-untyped-def]
    for b in range(len(blocks)):
        for k in range(blocks.shape[1]):
            blocks[b, k] &= left[k]
        for e in range(codes.shape[1]):
            blocks[b, byte[e]] |= ((codes[b, e] >> of) & mask) << shift[e]


@compiled()
def _take_runs(blocks, byte, shift, mask, of, codes):  # type: ignore[no-untyped-def]
    for b in range(len(blocks)):
        for e in range(0, codes.shape[1], RUN):
            source, to, by = blocks[b, byte[e] : byte[e] + RUN], codes[b, e : e + RUN], shift[e]
            for k in range(RUN):
                to[k] |= ((source[k] >> by) & mask) << of


@compiled()
def _put_runs(codes, byte, shift, mask, of, left, blocks):  # type: ignore[no-untyped-def]
    for b in range(len(blocks)):
        for k in range(blocks.shape[1]):
            blocks[b, k] &= left[k]
        for e in range(0, codes.shape[1], RUN):
            source, to, by = codes[b, e : e + RUN], blocks[b, byte[e] : byte[e] + RUN], shift[e]
            for k in range(RUN):
                to[k] |= ((source[k] >> of) & mask) << by
