"""Error feedback and descent for integer codes with one bf16 scale per group of inputs or per row; see feedback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ernie_quant.kernels import feedback
from ernie_quant.kernels.curvature import Inputs
from ernie_quant.kernels.rtn import SMALLEST, Array
from ernie_quant.kernels.rtn_feedback_loops import descend_block, feedback_block

F = np.float32
BLOCK, BLOCK_OF_CHANNEL = 64, 128  # inputs; the first is filled up with whole groups


@dataclass(frozen=True)
class Grid:
    """Codes from `low` to `high`; a group's scale is its largest |w| * a ratio / divisor, the largest on the longer side."""

    group: int
    low: int
    high: int
    divisor: int
    ratios: tuple[float, ...]
    signed: bool


class IntegerTile:
    """`feedback.Tile`: codes int8 [in, TILE], scale f32 [groups, TILE]."""

    def __init__(self, width: int, grid: Grid, scale: torch.Tensor | None) -> None:
        self.grid, self.per_row = grid, scale is not None
        groups = width // grid.group
        self.scale = torch.empty((groups, feedback.TILE)) if scale is None else scale[None].contiguous()
        self.codes = torch.zeros((width, feedback.TILE), dtype=torch.int8)
        self.decoded = torch.zeros((width, feedback.TILE))
        self.ratios = np.array(() if self.per_row else grid.ratios, F)

    def blocks(self) -> Sequence[slice]:
        """Whole groups, or parts of a row that has one scale."""
        group, width = self.grid.group, len(self.codes)
        size = BLOCK_OF_CHANNEL if self.per_row else group * max(1, BLOCK // group)
        return [slice(first, min(first + size, width)) for first in range(0, width, size)]

    def _parts(self, block: slice) -> tuple[int, Array, Array, Array]:
        """Inputs that share a scale in the block; its codes, scales and decoded weights."""
        group = block.stop - block.start if self.per_row else self.grid.group
        groups = slice(0, 1) if self.per_row else slice(block.start // group, block.stop // group)
        return group, self.codes[block].numpy(), self.scale[groups].numpy(), self.decoded[block].numpy()

    def feedback(self, block: slice, weight: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Scales of groups are chosen here, those of rows are given."""
        group, codes, scale, decoded = self._parts(block)
        errors = torch.empty_like(weight)
        low, high, divisor = F(self.grid.low), F(self.grid.high), F(self.grid.divisor)
        upper_, inverse = upper.contiguous().numpy(), upper.diagonal().reciprocal().numpy()
        feedback_block(
            weight.numpy(), upper_, inverse, group, self.ratios, low, high, divisor, self.grid.signed,
            codes, scale, decoded, errors.numpy(),
        )  # fmt: skip
        return errors

    def descend(self, block: slice, gradient: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Codes one input at a time, then the scale of each group."""
        group, codes, scale, decoded = self._parts(block)
        change = torch.empty_like(gradient)
        low, high = F(self.grid.low), F(self.grid.high)
        curvature_, inverse = curvature.contiguous().numpy(), curvature.diagonal().reciprocal().numpy()
        descend_block(
            gradient.numpy(), curvature_, inverse, group, low, high, not self.per_row,
            codes, scale, decoded, change.numpy(),
        )  # fmt: skip
        return change

    def begin_pass(self, number: int, gradient: torch.Tensor, curvature: torch.Tensor) -> None:
        """The scale of a row by least squares, q H w / q H q times what it is, where the loss falls.

        Before codes move, and once: 1 to 2% of the loss after absmax, .1% after a search; after each pass it brought no more.
        """
        if number or not self.per_row:
            return
        of_decoded = (self.decoded * (curvature @ self.decoded)).sum(0)
        step = (gradient * self.decoded).sum(0) / of_decoded
        scale = (self.scale[0] * torch.where(of_decoded > 0, 1 - step, 1.0)).bfloat16().float()
        decoded = (self.codes.float() * scale).bfloat16().float()
        change = decoded - self.decoded
        of_change = curvature @ change
        better = (change * (2 * gradient + of_change)).sum(0) < 0
        gradient.addcmul_(of_change, better.float())
        self.scale[0] = torch.where(better, scale, self.scale[0])
        self.decoded = torch.where(better, decoded, self.decoded)


def encode(
    weight: torch.Tensor, inputs: Inputs, grid: Grid, passes: int, scale_of: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [rows, in] and scales bf16 [rows, groups] of an encodable f32 weight.

    Where a row has one scale, `scale_of` finds them for rows [n, in] that are multiplied by powers of two: [n].
    """
    exponent = feedback.exponents(weight)
    weight = torch.ldexp(weight, -exponent[:, None])
    given = None if scale_of is None else scale_of(weight).bfloat16().float()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty((len(weight), weight.shape[1] // grid.group))
    for rows, part in feedback.tiles(weight, inputs.order):
        n = rows.stop - rows.start
        mine = None if given is None else torch.nn.functional.pad(given[rows], (0, feedback.TILE - n), value=1.0)
        tile = IntegerTile(len(part), grid, mine)
        feedback.run(tile, part, inputs, passes)
        codes[rows], scales[rows] = tile.codes[:, :n].T, tile.scale[:, :n].T
    scales = torch.ldexp(scales, exponent[:, None])
    gone = scales.abs() < float(SMALLEST)  # as in rtn: such a group is stored as zeros
    codes.view(*scales.shape, -1)[gone] = 0
    return codes, torch.where(gone, 1.0, scales).bfloat16()
