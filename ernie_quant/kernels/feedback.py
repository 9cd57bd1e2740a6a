"""Error feedback and descent over tiles of rows: what integers and WINT2 have in common.

Feedback (GPTQ: Frantar et al., arXiv 2210.17323): inputs one after the other; with H^-1 = U^T U the error of input j,
err_j = (w_j - q_j) / U_jj, is made up for by later inputs, w_later -= err_j U_j,later. The loss of a row is then sum err^2.
Blocks of inputs: within one by compiled loops, on later ones by one product of matrices.

Descent: with G = (q - w) H, codes of one block change where the loss (q - w) H (q - w)^T falls, and G follows.

A tile is transposed, [in, TILE], so that rows lie side by side in vector registers, and always of TILE rows, filled up with
zeros: products of one shape give a row the same bits wherever it stands. Other processors and libraries may sum in another
order: unlike data-free ones these codes belong to the machine, as statistics do that come from running a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from ernie_quant.kernels.curvature import Inputs

TILE = 128  # rows; products of [in, 64] and [64, 128] reach 95 to 120 of 170 Gflop/s, those with 64 rows 78 to 95
# Rows are worked on at a largest |w| in [1, 2). Beyond these, and with NaN, no scale of every format is finite and normal.
MIN_PEAK, MAX_PEAK = 2.0**-104, 2.0**120


class Tile(Protocol):
    """Codes of TILE rows on their way; `decoded` f32 [in, TILE] is what they decode to."""

    decoded: torch.Tensor

    def blocks(self) -> Sequence[slice]:
        """Of inputs, first to last."""
        ...

    def feedback(self, block: slice, weight: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Choose the codes of weight [block, TILE]: err [block, TILE]. `upper` is that of the block with itself."""
        ...

    def descend(self, block: slice, gradient: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Change codes, and scales of groups, where the loss falls: the change of `decoded` [block, TILE]."""
        ...

    def begin_pass(self, number: int, gradient: torch.Tensor, curvature: torch.Tensor) -> None:
        """Change scales of rows where the loss falls; gradient [in, TILE] follows."""
        ...


def run(tile: Tile, weight: torch.Tensor, inputs: Inputs, passes: int) -> None:
    """Feedback, then `passes` of descent, for weight f32 [in, TILE]."""
    upper, curvature = inputs.upper, inputs.curvature
    rest = weight.clone()
    for block in tile.blocks():
        errors = tile.feedback(block, rest[block], upper[block, block])
        rest[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    if not passes:
        return
    gradient = curvature @ (tile.decoded - weight)
    for left in reversed(range(passes)):
        tile.begin_pass(passes - 1 - left, gradient, curvature)
        for block in tile.blocks():
            change = tile.descend(block, gradient[block], curvature[block, block])
            first = 0 if left else block.stop  # the last pass does not come back
            gradient[first:].addmm_(curvature[block, first:].T, change)


def exponents(weight: torch.Tensor) -> torch.Tensor:
    """int32 [rows]: e with the largest |w| of the row in [2^e, 2^(e+1))."""
    return torch.frexp(weight.abs().amax(1)).exponent - 1


def encodable(weight: torch.Tensor) -> torch.Tensor:
    """bool [rows]: has the row numbers that feedback can work on?"""
    peak = weight.abs().amax(1)
    return (peak >= MIN_PEAK) & (peak <= MAX_PEAK)  # a NaN is neither


def tiles(weight: torch.Tensor, order: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of f32 [rows, in], and f32 [in, TILE] of them in the order of the codes, with zeros for rows that are missing."""
    for first in range(0, len(weight), TILE):
        rows = slice(first, min(first + TILE, len(weight)))
        part = weight[rows] if order is None else weight[rows][:, order]
        tile = torch.zeros((weight.shape[1], TILE))
        tile[:, : len(part)] = part.T
        yield rows, tile
