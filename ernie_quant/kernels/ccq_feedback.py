"""Error feedback and descent for WINT2, four inputs at a time in stored order; see ccq_reference (formats) and feedback.

For the inputs b of a byte, V = U_bb^-1: the byte is that with the least |(w - s c) V|^2 over its values c, err = (w - q) V with
the decoded q, and later columns lose err U_b,later. In descent the byte has the least (a - s c) H_bb (a - s c)^T around the
optimum a = q - G_b H_bb^-1. Both are the largest z . c - c A c^T / 2, with z = w A / s and A = V V^T, or z = (q H_bb - G_b) / s
and A = H_bb: one loop, and no inverse of H_bb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ernie_quant.kernels import feedback
from ernie_quant.kernels.ccq_descent_loops import descend_group
from ernie_quant.kernels.ccq_feedback_loops import feedback_group
from ernie_quant.kernels.ccq_reference import GROUP, Pair, code_values, fields, stored_positions
from ernie_quant.kernels.curvature import Inputs, inputs
from ernie_quant.kernels.rtn import Array

# A group's local scale is tried at round(rms / CODE_RMS / super) and these steps beside it; super = rms / CODE_RMS / LOCAL_TOP
# of the loudest group, which leaves it room to grow by feedback.
CODE_RMS, LOCAL_TOP = 14.5, 12.5
FEEDBACK_STEPS = (-1, 0, 1)
DESCENT_STEPS = (-1, 1)
FAR = 0.02  # of a super scale from its least squares


@dataclass(frozen=True)
class Metric:
    """A of the inputs of each byte, f32 [in/4, 4, 4], and of each byte -c A c^T / 2: `half` f32 [in/4, pairs, 256]."""

    matrix: torch.Tensor
    half: torch.Tensor


@dataclass(frozen=True)
class Prepared:
    """What one set of inputs and a list of pairs have in common for all weights."""

    pairs: Sequence[Pair]
    values: torch.Tensor  # f32 [pairs, 256, 4]
    inputs: Inputs
    inverse: torch.Tensor  # V, f32 [in/4, 4, 4]
    of_feedback: Metric
    of_descent: Metric


def prepare(hessian: torch.Tensor, damping: float, pairs: Sequence[Pair]) -> Prepared:
    """For H f32 [in, in] in logical order."""
    found = inputs(hessian, damping, stored_positions(len(hessian)))
    table = torch.tensor(pairs, dtype=torch.float32)
    values = code_values(table[:, 0], table[:, 1]).float()
    eye = torch.eye(4).expand(len(hessian) // 4, 4, 4)
    inverse = torch.linalg.solve_triangular(fours(found.upper), eye, upper=True).contiguous()
    of_feedback, of_descent = metric_of(inverse @ inverse.mT, values), metric_of(fours(found.curvature), values)
    return Prepared(pairs, values, found, inverse, of_feedback, of_descent)


def fours(square: torch.Tensor) -> torch.Tensor:
    """[n, n] -> its diagonal blocks [n/4, 4, 4]."""
    n = len(square)
    return square.reshape(n // 4, 4, n // 4, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def metric_of(matrix: torch.Tensor, values: torch.Tensor) -> Metric:
    """A f32 [in/4, 4, 4] and the values of bytes f32 [pairs, 256, 4]."""
    along = values @ matrix[:, None]  # [in/4, pairs, 256, 4]
    return Metric(matrix, (along * values).sum(3) * -0.5)


class CodeTile:
    """`feedback.Tile`: codes uint8 [in/4, TILE], local scales uint8 [in/64, TILE], super scales f32 [TILE], one pair."""

    def __init__(self, weight: torch.Tensor, prepared: Prepared, pair: int) -> None:
        width = len(weight)
        self.prepared, self.pair, self.values = prepared, pair, prepared.values[pair]
        self.codes = torch.zeros((width // 4, feedback.TILE), dtype=torch.uint8)
        self.local_scale = torch.zeros((width // GROUP, feedback.TILE), dtype=torch.uint8)
        rms = weight.view(-1, GROUP, feedback.TILE).square().mean(1).sqrt()
        self.super_scale = (rms.amax(0) / (CODE_RMS * LOCAL_TOP)).bfloat16().float()
        self.decoded = torch.zeros_like(weight)

    def blocks(self) -> Sequence[slice]:
        """Groups of 64 inputs."""
        return [slice(first, first + GROUP) for first in range(0, len(self.decoded), GROUP)]

    def _metric(self, block: slice, metric: Metric) -> tuple[Array, Array, Array]:
        """A, halves and the values of bytes."""
        fours_ = slice(block.start // 4, block.stop // 4)
        return metric.matrix[fours_].numpy(), metric.half[fours_, self.pair].numpy(), self.values.numpy()

    def _parts(self, block: slice) -> tuple[Array, Array, Array, Array]:
        """Super scales, and codes, local scales and decoded weights of a group."""
        codes = self.codes[block.start // 4 : block.stop // 4]
        local = self.local_scale[block.start // GROUP]
        return self.super_scale.numpy(), codes.numpy(), local.numpy(), self.decoded[block].numpy()

    def feedback(self, block: slice, weight: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Bytes and the local scale of a group."""
        errors, inverse = torch.empty_like(weight), self.prepared.inverse[block.start // 4 : block.stop // 4]
        feedback_group(
            weight.numpy(), upper.contiguous().numpy(), inverse.numpy(), *self._metric(block, self.prepared.of_feedback),
            np.float32(CODE_RMS), np.array(FEEDBACK_STEPS), *self._parts(block), errors.numpy(),
        )  # fmt: skip
        return errors

    def descend(self, block: slice, gradient: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Bytes, then the local scale of a group."""
        change = torch.empty_like(gradient)
        descend_group(
            gradient.numpy(), curvature.contiguous().numpy(), *self._metric(block, self.prepared.of_descent),
            np.array(DESCENT_STEPS), *self._parts(block), change.numpy(),
        )  # fmt: skip
        return change

    def begin_pass(self, number: int, gradient: torch.Tensor, curvature: torch.Tensor) -> None:
        """Super scales by least squares, q H w / q H q times what they are, where that is far from 1 and the loss falls.

        For nearly all rows it takes next to nothing off the loss. But the input of one neuron may weigh a million times more than
        others (it makes a window's first token large, in a layer of many models), and its weights lie outside of what the scale
        reaches that fits the others: nearly all of the loss is there.
        """
        of_decoded = (self.decoded * (curvature @ self.decoded)).sum(0)
        factor = torch.where(of_decoded > 0, 1 - (gradient * self.decoded).sum(0) / of_decoded, 1.0)
        far = (factor - 1).abs() > FAR
        if not far.any():
            return
        scale = torch.where(far, self.super_scale * factor.clamp(min=0), self.super_scale).bfloat16().float()
        decoded = self._decoded_with(scale)
        change = decoded - self.decoded
        of_change = curvature @ change
        better = (change * (2 * gradient + of_change)).sum(0) < 0
        gradient.addcmul_(of_change, better.float())
        self.super_scale = torch.where(better, scale, self.super_scale)
        self.decoded = torch.where(better, decoded, self.decoded)

    def _decoded_with(self, scale: torch.Tensor) -> torch.Tensor:
        """The codes at other super scales [TILE]."""
        product = (self.local_scale * scale).bfloat16().float()
        values = self.values[self.codes.int()].transpose(1, 2).reshape(-1, GROUP, feedback.TILE)  # [in/64, 64, TILE]
        return (values * product[:, None]).bfloat16().float().flatten(0, 1)


def encode(weight: torch.Tensor, prepared: Prepared, pair: torch.Tensor, passes: int) -> dict[str, torch.Tensor]:
    """The fields of an encodable f32 weight [rows, in] in logical order; pair int64 [rows]: a place in `prepared.pairs`."""
    exponent = feedback.exponents(weight)
    weight = torch.ldexp(weight, -exponent[:, None])
    rows, width = weight.shape
    codes = torch.zeros((rows, width // 4), dtype=torch.uint8)
    local_scale = torch.zeros((rows, width // GROUP), dtype=torch.uint8)
    super_scale = torch.zeros(rows)
    for which in sorted(set(pair.tolist())):
        mine = (pair == which).nonzero()[:, 0]
        for part, tile_weight in feedback.tiles(weight[mine], prepared.inputs.order):
            n, at = part.stop - part.start, mine[part]
            tile = CodeTile(tile_weight, prepared, which)
            feedback.run(tile, tile_weight, prepared.inputs, passes)
            codes[at], local_scale[at], super_scale[at] = tile.codes[:, :n].T, tile.local_scale[:, :n].T, tile.super_scale[:n]
    return fields(codes, local_scale, torch.ldexp(super_scale, exponent), pair, prepared.pairs)
