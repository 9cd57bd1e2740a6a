"""Which of WINT2's 256 bytes are tried for 4 weights: the 8 nearest to the middle of the cell that the weights lie in.

The values of a byte lie between -32 and 31. The space of 4 weights, divided by their scale, is cut into 8^4 cells with edges
of 8; what lies outside belongs to the cell beside it, so the middles of outer cells are moved out by 2. What
that costs while scales are searched is held by test_ccq: of Gaussian vectors less than one of 1000 has its nearest byte
outside of the list, which adds less than .03% to the error.

A line of 64 bytes, one cache line, holds what scores 8 bytes: the first two values of each (int8), the last two, and -256
times their squared norm (int32).

The byte that is stored is the nearest of all 256 (ccq_choice). It is listed where the best of the list is nearer than any
other byte is to the cell; elsewhere those bytes are looked through whose first value, which grows with the byte, is near
enough.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ernie_quant.kernels.ccq_reference import LISTED, Pair, code_values, listed

LINE = 64  # bytes
LAST_TWO, NORMS = 2 * LISTED, 4 * LISTED  # where they begin in a line
REACH = 64  # x lies between -64 and 64


class Tables(NamedTuple):
    """Of each pair."""

    lines: torch.Tensor  # int8 [pairs, CELLS * LINE], each line at a multiple of 64 bytes
    listed: torch.Tensor  # uint8 [pairs, CELLS * LISTED]: the bytes of the lines
    clear: torch.Tensor  # int32 [pairs, CELLS]: 4 times the squared distance from a cell to the nearest byte that is not listed
    values: torch.Tensor  # int8 [pairs, 256, 4]
    all_lines: torch.Tensor  # int8 [pairs, 32 * LINE]: all bytes, in order
    begins: torch.Tensor  # int32 [pairs, 65]: the first byte whose first value is at least -32, -31, ...


@functools.lru_cache(maxsize=8)
def tables(pairs: tuple[Pair, ...]) -> Tables:
    """What the search reads; made once, as every block of rows asks for it."""
    return Tables(*map(torch.stack, zip(*map(_tables, pairs), strict=True)))


def _tables(pair: Pair) -> Tables:
    values = code_values(*torch.tensor([pair], dtype=torch.float32).T)[0]  # [256, 4]
    bytes_ = listed(values)  # [CELLS, LISTED]
    away = _squared_distances(values).scatter_(1, bytes_, 1 << 30)
    begins = torch.searchsorted(values[:, 0].contiguous(), torch.arange(-32, 33, dtype=torch.int32))
    every = torch.arange(256).view(-1, LISTED)
    nearest = (_lines(values, bytes_), bytes_.to(torch.uint8).flatten(), away.amin(1).to(torch.int32))
    return Tables(*nearest, values.to(torch.int8), _lines(values, every), begins.to(torch.int32))


def _lines(values: torch.Tensor, bytes_: torch.Tensor) -> torch.Tensor:
    near = values[bytes_]  # [lines, LISTED, 4]
    made = torch.empty(len(near), LINE, dtype=torch.int8)
    made[:, :LAST_TWO] = near[:, :, :2].flatten(1).to(torch.int8)
    made[:, LAST_TWO:NORMS] = near[:, :, 2:].flatten(1).to(torch.int8)
    made[:, NORMS:] = (-256 * near.square().sum(2)).to(torch.int32).view(torch.int8)
    return made.flatten()


def _squared_distances(values: torch.Tensor) -> torch.Tensor:
    """Four times those from every cell, with all that belongs to it, to every byte: int64 [CELLS, 256]."""
    low = 16 * torch.arange(8) - 65  # doubled, so that all is whole
    high = low + 16
    low[0], high[-1] = -2 * REACH, 2 * REACH
    doubled = 2 * values.long()  # [256, 4]
    along = torch.maximum(low[:, None, None] - doubled, doubled - high[:, None, None]).clamp(min=0).square()  # [8, 256, 4]
    places = torch.cartesian_prod(*[torch.arange(8)] * 4)  # [CELLS, 4]
    return sum((along[places[:, i], :, i] for i in range(4)), torch.zeros((), dtype=torch.int64))
