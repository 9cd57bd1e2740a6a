"""Error feedback and descent for WINT2, four inputs at a time in stored order; see ccq_reference (formats) and feedback.

For the inputs b of a byte, V = U_bb^-1: the byte is that with the least |(w - s c) V|^2 over its values c, err = (w - q) V with
the decoded q, and later columns lose err U_b,later. In descent the byte has the least (a - s c) H_bb (a - s c)^T around the
optimum a = q - G_b H_bb^-1. Both are the largest z . c - c A c^T / 2, with z = w A / s and A = V V^T, or z = (q H_bb - G_b) / s
and A = H_bb: one loop, and no inverse of H_bb.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ernie_quant.kernels import feedback
from ernie_quant.kernels.ccq_feedback_loops import descend_group, feedback_group
from ernie_quant.kernels.ccq_reference import GROUP, MAX_LOCAL, Pair, code_values, fields
from ernie_quant.kernels.curvature import Inputs
from ernie_quant.kernels.rtn import Array

# A group's local scale is tried at round(rms / CODE_RMS / super) and these steps beside it; super = rms / CODE_RMS / LOCAL_TOP
# of the loudest group, which leaves it room to grow by feedback.
CODE_RMS, LOCAL_TOP = 14.5, 12.5
FEEDBACK_STEPS = (-1, 0, 1)
DESCENT_STEPS = (-1, 1)


class CodeTile:
    """`feedback.Tile`: codes uint8 [in/4, TILE], local scales uint8 [in/64, TILE], super scales f32 [TILE], one pair."""

    def __init__(self, weight: torch.Tensor, values: torch.Tensor) -> None:
        width = len(weight)
        self.values = values  # f32 [256, 4]
        self.codes = torch.zeros((width // 4, feedback.TILE), dtype=torch.uint8)
        self.local_scale = torch.zeros((width // GROUP, feedback.TILE), dtype=torch.uint8)
        rms = weight.view(-1, GROUP, feedback.TILE).square().mean(1).sqrt()
        self.super_scale = (rms.amax(0) / (CODE_RMS * LOCAL_TOP)).bfloat16().float()
        self.decoded = torch.zeros_like(weight)

    def blocks(self) -> Sequence[slice]:
        """Groups of 64 inputs."""
        return [slice(first, first + GROUP) for first in range(0, len(self.decoded), GROUP)]

    def _parts(self, block: slice) -> tuple[Array, Array, Array, Array]:
        """Super scales, and codes, local scales and decoded weights of a group."""
        codes = self.codes[block.start // 4 : block.stop // 4]
        local = self.local_scale[block.start // GROUP]
        return self.super_scale.numpy(), codes.numpy(), local.numpy(), self.decoded[block].numpy()

    def feedback(self, block: slice, weight: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Bytes and the local scale of a group."""
        errors, inverse = torch.empty_like(weight), inverses(upper)
        feedback_group(
            weight.numpy(), upper.contiguous().numpy(), inverse.numpy(), (inverse @ inverse.mT).numpy(), self.values.numpy(),
            np.float32(CODE_RMS), np.array(FEEDBACK_STEPS), *self._parts(block), errors.numpy(),
        )  # fmt: skip
        return errors

    def descend(self, block: slice, gradient: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Bytes, then the local scale of a group."""
        change = torch.empty_like(gradient)
        descend_group(
            gradient.numpy(), curvature.contiguous().numpy(), fours(curvature).numpy(), self.values.numpy(),
            np.array(DESCENT_STEPS), *self._parts(block), change.numpy(),
        )  # fmt: skip
        return change

    def rescaled(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Other super scales; a row of zeros has none."""
        scale = (self.super_scale * factor.clamp(min=0)).bfloat16().float()
        product = (self.local_scale * scale).bfloat16().float()
        values = self.values[self.codes.int()].transpose(1, 2).reshape(-1, GROUP, feedback.TILE)  # [in/64, 64, TILE]
        return scale, (values * product[:, None]).bfloat16().float().flatten(0, 1)

    def take(self, scale: torch.Tensor, decoded: torch.Tensor) -> None:
        """A scale that is NaN stays what it was."""
        self.super_scale = torch.where(scale.isnan(), self.super_scale, scale)
        self.decoded = decoded


def fours(square: torch.Tensor) -> torch.Tensor:
    """[n, n] -> its diagonal blocks [n/4, 4, 4]."""
    n = len(square)
    return square.reshape(n // 4, 4, n // 4, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def inverses(upper: torch.Tensor) -> torch.Tensor:
    """U [n, n] -> V = U_bb^-1, f32 [n/4, 4, 4], upper triangular."""
    eye = torch.eye(4).expand(len(upper) // 4, 4, 4)
    solved: torch.Tensor = torch.linalg.solve_triangular(fours(upper), eye, upper=True)
    return solved.contiguous()


def encode(
    weight: torch.Tensor, inputs: Inputs, pairs: Sequence[Pair], pair: torch.Tensor, passes: int
) -> dict[str, torch.Tensor]:
    """The fields of an encodable f32 weight [rows, in] in logical order; pair int64 [rows]: a place in `pairs`."""
    exponent = feedback.exponents(weight)
    weight = torch.ldexp(weight, -exponent[:, None])
    rows, width = weight.shape
    codes = torch.zeros((rows, width // 4), dtype=torch.uint8)
    local_scale = torch.zeros((rows, width // GROUP), dtype=torch.uint8)
    super_scale = torch.zeros(rows)
    table = torch.tensor(pairs, dtype=torch.float32)
    values = code_values(table[:, 0], table[:, 1]).float()
    for which in sorted(set(pair.tolist())):
        mine = (pair == which).nonzero()[:, 0]
        for part, tile_weight in feedback.tiles(weight[mine], inputs.order):
            n, at = part.stop - part.start, mine[part]
            tile = CodeTile(tile_weight, values[which])
            feedback.run(tile, tile_weight, inputs, passes)
            codes[at], local_scale[at], super_scale[at] = tile.codes[:, :n].T, tile.local_scale[:, :n].T, tile.super_scale[:n]
    return fields(codes, local_scale, torch.ldexp(super_scale, exponent), pair, pairs)


assert MAX_LOCAL == 15  # what the loops clamp to
