"""The loops of rtn_feedback_loops in plain torch, to the bit: the same float32 operations in the same order."""

from __future__ import annotations

import torch

from ernie_quant.kernels.rtn_feedback import Grid
from ernie_quant.kernels.rtn_reference import _codes, _scale, sum_in_order

Tensor = torch.Tensor


def feedback_block(weight: Tensor, upper: Tensor, grid: Grid, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales [groups, rows], decoded and err of weight f32 [block, rows]; at the scale `given` [rows] if there is one."""
    work, group = weight.clone(), len(weight) if given is not None else grid.group
    found: list[tuple[Tensor, ...]] = []
    for lo in range(0, len(weight), group):
        part = slice(lo, lo + group)
        trials = [given] if given is not None else [_scale(_top(work[part], grid) * r / grid.divisor) for r in grid.ratios]
        best = least = None
        for scale in trials:
            assert scale is not None
            trial, total = _walk(work[part].clone(), upper[part, part], scale, grid)
            better = torch.ones_like(total, dtype=torch.bool) if least is None else total < least
            best = trial if best is None else tuple(torch.where(better, a, b) for a, b in zip(trial, best, strict=True))
            least = total if least is None else torch.where(better, total, least)
        assert best is not None
        for j in range(group):
            work[lo + group :] -= best[2][j] * upper[lo + j, lo + group :, None]
        found.append(best)
    codes, decoded, errors, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes.to(torch.int8), scales, decoded, errors


def _top(work: Tensor, grid: Grid) -> Tensor:
    """The weight with the largest magnitude, the first of equals: f32 [group, rows] -> [rows]."""
    top = torch.zeros_like(work[0])
    for w in work:
        top = torch.where(w.abs() > top.abs(), w, top)
    return -top if grid.signed else top.abs()


def _walk(work: Tensor, upper: Tensor, scale: Tensor, grid: Grid) -> tuple[tuple[Tensor, ...], Tensor]:
    """Codes, decoded, err [group, rows] and the scale [1, rows] of a group, and sum err^2 [rows]."""
    codes, decoded, errors = torch.empty_like(work), torch.empty_like(work), torch.empty_like(work)
    inverse = upper.diagonal().reciprocal()
    for j in range(len(work)):
        codes[j] = _codes(work[j][:, None], scale, grid.low, grid.high)[:, 0]
        decoded[j] = (codes[j] * scale).bfloat16().float()
        errors[j] = (work[j] - decoded[j]) * inverse[j]
        work[j + 1 :] -= errors[j] * upper[j, j + 1 :, None]
    return (codes, decoded, errors, scale[None]), sum_in_order(errors.T.square())


def descend_block(
    gradient: Tensor, curvature: Tensor, grid: Grid, rescale: bool, codes: Tensor, scale: Tensor, decoded: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [block, rows], scales [groups, rows] and decoded after one pass over a block; nothing given is changed."""
    g, c, q, scale = gradient.clone(), codes.float(), decoded.clone(), scale.clone()
    inverse, group = curvature.diagonal().reciprocal(), len(codes) // len(scale)
    for i in range(len(scale)):
        part = slice(i * group, (i + 1) * group)
        for j in range(part.start, part.stop):
            step = g[j] * inverse[j]
            aim = q[j] - step
            code = _codes(aim[:, None], scale[i], grid.low, grid.high)[:, 0]
            new = (code * scale[i]).bfloat16().float()
            better = (new - aim).abs() < step.abs()
            g += torch.where(better, new - q[j], 0) * curvature[j, :, None]
            c[j], q[j] = torch.where(better, code, c[j]), torch.where(better, new, q[j])
        if rescale:
            _rescale(g, c[part], q, scale[i], curvature, part)
    return c.to(torch.int8), scale, q


def _rescale(g: Tensor, c: Tensor, q: Tensor, scale: Tensor, curvature: Tensor, part: slice) -> None:
    """The closed form for the scale [rows] of one group with codes c, as stored, where the loss falls with it."""
    up = sum_in_order((c * g[part]).T)
    down = sum_in_order((c * along(c, curvature[part, part])).T)
    moved = _scale(torch.where(down > 0, scale - up / down, scale))
    new = (c * moved).bfloat16().float()
    better = take_better(g, q, part, new, curvature)
    scale.copy_(torch.where(better, moved, scale))


def along(x: Tensor, curvature: Tensor) -> Tensor:
    """x H, first to last: f32 [m, rows] and [m, n] -> [n, rows]."""
    total = torch.zeros(curvature.shape[1], x.shape[1])
    for j in range(len(x)):
        total += x[j] * curvature[j, :, None]
    return total


def take_better(g: Tensor, q: Tensor, part: slice, new: Tensor, curvature: Tensor) -> Tensor:
    """bool [rows]: where the loss falls if the inputs of `part` decode to `new`; there q and g follow."""
    change = new - q[part]
    product = along(change, curvature[part])
    better = sum_in_order((change * ((g[part] + g[part]) + product[part])).T) < 0
    q[part] = torch.where(better, new, q[part])
    g.copy_(torch.where(better, g + product, g))
    return better
