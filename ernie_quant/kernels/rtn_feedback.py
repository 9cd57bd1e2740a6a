"""Error feedback and descent for integer codes with one bf16 scale per group of inputs or per row; see feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ernie_quant.kernels import feedback
from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels.curvature import Inputs
from ernie_quant.kernels.rtn import ROUND, SMALLEST, Array

F = np.float32
LANES = 64  # rows side by side in the loops: a block of 64 inputs and its errors fit the processor's first cache
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

    def rescaled(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of rows that have one scale."""
        if not self.per_row:
            return None
        scale = (self.scale[0] * factor).bfloat16().float()
        return scale, (self.codes.float() * scale).bfloat16().float()

    def take(self, scale: torch.Tensor, decoded: torch.Tensor) -> None:
        """A scale that is NaN stays what it was."""
        self.scale[0] = torch.where(scale.isnan(), self.scale[0], scale)
        self.decoded = decoded


def encode(
    weight: torch.Tensor, inputs: Inputs, grid: Grid, passes: int, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [rows, in] and scales bf16 [rows, groups] of an encodable f32 weight; `scale` [rows] where rows have one."""
    exponent = feedback.exponents(weight)
    weight = torch.ldexp(weight, -exponent[:, None])
    given = None if scale is None else torch.ldexp(scale.float(), -exponent)
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


@compiled()
def _round_row(x, bits):  # type: ignore[no-untyped-def]
    """f32 [n] rounded to bf16 in place, half to even; bits is x as uint32."""
    for v in range(x.size):
        bits[v] = (bits[v] + np.uint32(0x7FFF) + ((bits[v] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@compiled()
def _scale_row(scale, bits):  # type: ignore[no-untyped-def]
    """Rounded to bf16; what is too small for a scale, or no number, becomes 1."""
    _round_row(scale, bits)
    for v in range(scale.size):
        scale[v] = scale[v] if abs(scale[v]) >= SMALLEST and abs(scale[v]) < F(np.inf) else F(1)


@compiled()
def _tops(work, signed, top):  # type: ignore[no-untyped-def]
    """Largest |x| of each lane of f32 [group, lanes]; negative where the largest x is positive and the scale may be signed."""
    for v in range(top.size):
        top[v] = F(0)
    for j in range(len(work)):
        for v in range(top.size):
            top[v] = work[j, v] if abs(work[j, v]) > abs(top[v]) else top[v]
    for v in range(top.size):
        top[v] = -top[v] if signed else abs(top[v])


@compiled()
def _walk(work, upper, inverse, scale, low, high, codes, decoded, errors, total):  # type: ignore[no-untyped-def]
    """One group with feedback at one scale: work f32 [group, lanes], which is used up, -> codes, decoded, err, sum err^2."""
    n, lanes = work.shape
    bits, reciprocal = decoded.view(np.uint32), np.empty(lanes, F)
    for v in range(lanes):
        total[v] = F(0)
        reciprocal[v] = F(1) / scale[v]
    for j in range(n):
        w, c, q, e = work[j], codes[j], decoded[j], errors[j]
        for v in range(lanes):
            c[v] = (min(max(w[v] * reciprocal[v], low), high) + ROUND) - ROUND
            q[v] = c[v] * scale[v]
        _round_row(q, bits[j])
        for v in range(lanes):
            e[v] = (w[v] - q[v]) * inverse[j]
            total[v] += e[v] * e[v]
        _subtract(work, e, upper[j], j + 1)


@compiled()
def _subtract(work, error, upper, first):  # type: ignore[no-untyped-def]
    """work[k] -= error * upper[k] from the input `first` on."""
    for k in range(first, len(work)):
        w, u = work[k], upper[k]
        for v in range(error.size):
            w[v] -= error[v] * u


@compiled()
def feedback_block(  # type: ignore[no-untyped-def]
    weight, upper, inverse, group, ratios, low, high, divisor, signed, codes, scale, decoded, errors
):
    """The groups of a block one after the other, each at the best of its scales (the given one where there are no ratios)."""
    n, rows = weight.shape
    work, trial = np.empty((n, LANES), F), np.empty((4, group, LANES), F)
    best, lane = np.empty((3, group, LANES), F), np.empty((5, LANES), F)
    top, at, total, least, chosen = lane[0], lane[1], lane[2], lane[3], lane[4]
    for first in range(0, rows, LANES):
        lanes = slice(first, first + LANES)
        work[:] = weight[:, lanes]
        for g in range(n // group):
            lo, hi = g * group, (g + 1) * group
            _tops(work[lo:hi], signed, top)
            for k in range(max(1, ratios.size)):
                if ratios.size:
                    for v in range(LANES):
                        at[v] = top[v] * ratios[k] / divisor
                    _scale_row(at, at.view(np.uint32))
                else:
                    at[:] = scale[g, lanes]
                trial[0] = work[lo:hi]
                _walk(trial[0], upper[lo:hi, lo:hi], inverse[lo:hi], at, low, high, trial[1], trial[2], trial[3], total)
                _keep(k == 0, total, least, at, chosen, trial[1:], best)
            scale[g, lanes] = chosen
            for j in range(group):
                _subtract(work, best[2, j], upper[lo + j], hi)
                for v in range(LANES):
                    codes[lo + j, first + v] = np.int8(best[0, j, v])
                decoded[lo + j, lanes] = best[1, j]
                errors[lo + j, lanes] = best[2, j]


@compiled()
def _keep(always, total, least, scale, chosen, trial, best):  # type: ignore[no-untyped-def]
    """Lanes in which the trial has less error than the best so far: trial and best f32 [fields, group, lanes]."""
    for i in range(trial.shape[0]):
        for j in range(trial.shape[1]):
            to, new = best[i, j], trial[i, j]
            for v in range(total.size):
                to[v] = new[v] if always or total[v] < least[v] else to[v]
    for v in range(total.size):
        better = always or total[v] < least[v]
        chosen[v] = scale[v] if better else chosen[v]
        least[v] = total[v] if better else least[v]


@compiled()
def descend_block(  # type: ignore[no-untyped-def]
    gradient, curvature, inverse, group, low, high, rescale, codes, scale, decoded, change
):
    """Codes of a block, one input at a time, then each group's scale: -> change of decoded; gradient f32 [block, rows] stays."""
    n, rows = gradient.shape
    g, c, q = np.empty((n, LANES), F), np.empty((n, LANES), F), np.empty((n, LANES), F)
    lane, trial = np.empty((3, LANES), F), np.empty((3, group, LANES), F)
    for first in range(0, rows, LANES):
        lanes = slice(first, first + LANES)
        g[:] = gradient[:, lanes]
        q[:] = decoded[:, lanes]
        for j in range(n):
            for v in range(LANES):
                c[j, v] = F(codes[j, first + v])
        for i in range(n // group):
            lo, hi = i * group, (i + 1) * group
            at = scale[i, lanes]
            _descend_codes(g, c, q, at, curvature, inverse, low, high, lo, hi, lane)
            if rescale:
                _rescale(g, c[lo:hi], q[lo:hi], at, curvature, lo, hi, trial, lane)
        for j in range(n):
            for v in range(LANES):
                codes[j, first + v] = np.int8(c[j, v])
                change[j, first + v] = q[j, v] - decoded[j, first + v]
            decoded[j, lanes] = q[j]


@compiled()
def _descend_codes(g, c, q, scale, curvature, inverse, low, high, lo, hi, lane):  # type: ignore[no-untyped-def]
    """Inputs lo to hi: the code nearest to where the loss is least along this input, if what it decodes to is nearer."""
    d, t, reciprocal = lane[0], lane[1], lane[2]
    for v in range(d.size):
        reciprocal[v] = F(1) / scale[v]
    for j in range(lo, hi):
        gj, cj, qj = g[j], c[j], q[j]
        for v in range(d.size):
            aim = qj[v] - gj[v] * inverse[j]
            t[v] = ((min(max(aim * reciprocal[v], low), high) + ROUND) - ROUND) * scale[v]
        _round_row(t, t.view(np.uint32))
        for v in range(d.size):
            step = gj[v] * inverse[j]
            aim = qj[v] - step
            better = abs(t[v] - aim) < abs(step)
            code = (min(max(aim * reciprocal[v], low), high) + ROUND) - ROUND
            cj[v] = code if better else cj[v]
            d[v] = t[v] - qj[v] if better else F(0)
            qj[v] = t[v] if better else qj[v]
        _add(g, d, curvature[j])


@compiled()
def _add(g, change, curvature):  # type: ignore[no-untyped-def]
    """g[k] += change * curvature[k] for all inputs of the block."""
    for k in range(len(g)):
        to, h = g[k], curvature[k]
        for v in range(change.size):
            to[v] += change[v] * h


@compiled()
def _rescale(g, c, q, scale, curvature, lo, hi, trial, lane):  # type: ignore[no-untyped-def]
    """s - (c . G) / (c H c) as stored, where the loss falls with it: d . (2 G + d H) < 0."""
    t, d, along = trial[0], trial[1], trial[2]
    new, up, down = lane[0], lane[1], lane[2]
    _along(c, curvature, lo, hi, along)
    for v in range(new.size):
        up[v], down[v] = F(0), F(0)
    for j in range(hi - lo):
        for v in range(new.size):
            up[v] += c[j, v] * g[lo + j, v]
            down[v] += c[j, v] * along[j, v]
    for v in range(new.size):
        new[v] = scale[v] - up[v] / down[v] if down[v] > 0 else scale[v]
    _scale_row(new, new.view(np.uint32))
    for j in range(hi - lo):
        for v in range(new.size):
            t[j, v] = c[j, v] * new[v]
        _round_row(t[j], t[j].view(np.uint32))
        for v in range(new.size):
            d[j, v] = t[j, v] - q[j, v]
    _along(d, curvature, lo, hi, along)
    for v in range(new.size):
        up[v] = F(0)
    for j in range(hi - lo):
        for v in range(new.size):
            up[v] += d[j, v] * ((g[lo + j, v] + g[lo + j, v]) + along[j, v])
    for v in range(new.size):
        scale[v] = new[v] if up[v] < 0 else scale[v]
    for j in range(hi - lo):
        for v in range(new.size):
            d[j, v] = d[j, v] if up[v] < 0 else F(0)
            q[j, v] = t[j, v] if up[v] < 0 else q[j, v]
        _add(g, d[j], curvature[lo + j])


@compiled()
def _along(x, curvature, lo, hi, out):  # type: ignore[no-untyped-def]
    """x H of one group: f32 [group, lanes]."""
    for k in range(hi - lo):
        for v in range(x.shape[1]):
            out[k, v] = F(0)
    for j in range(hi - lo):
        _add(out, x[j], curvature[lo + j, lo:hi])
