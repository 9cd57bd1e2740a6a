"""The loops of ccq_feedback_loops and ccq_descent_loops in plain torch, to the bit.

The same float32 operations in the same order. Scores of bytes are fused: their products and sums are rounded once, which float64
does but for one case in 2^29. A processor without fused operations may choose another of two bytes that are as good.
"""

from __future__ import annotations

import torch

from ernie_quant.kernels.ccq_feedback import CODE_RMS, DESCENT_STEPS, FEEDBACK_STEPS
from ernie_quant.kernels.ccq_reference import GROUP, MAX_LOCAL
from ernie_quant.kernels.rtn_feedback_reference import take_better
from ernie_quant.kernels.rtn_reference import sum_in_order

Tensor = torch.Tensor


def feedback_group(
    weight: Tensor, upper: Tensor, inverse: Tensor, metric: Tensor, half: Tensor, values: Tensor, super_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 [16, rows], local scales uint8 [rows], decoded and err [64, rows] of weight f32 [64, rows]."""
    rms = (sum_in_order(weight.T.square()) / GROUP).sqrt()
    around = torch.where(super_scale > 0, (rms / CODE_RMS / super_scale).round(), 0)
    best: tuple[Tensor, ...] = ()
    for step in FEEDBACK_STEPS:
        local = (around + step).clamp(0, MAX_LOCAL)
        trial = (*_walk(weight.clone(), upper, inverse, metric, half, values, _product(local, super_scale)), local)
        better = trial[3] < best[3] if best else torch.ones_like(local, dtype=torch.bool)
        best = tuple(torch.where(better, a, b) for a, b in zip(trial, best or trial, strict=True))
    return best[0].to(torch.uint8), best[4].to(torch.uint8), best[1], best[2]


def _product(local: Tensor, super_scale: Tensor) -> Tensor:
    """bf16(local * super), as f32."""
    return (local.float() * super_scale).bfloat16().float()


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x f32 [4, rows] times matrix f32 [4, 4], first to last."""
    total = x[0] * matrix[0, :, None]
    for m in range(1, 4):
        total = total + x[m] * matrix[m, :, None]
    return total


def best_bytes(z: Tensor, values: Tensor, half: Tensor) -> Tensor:
    """The bytes with the largest z . c + half, the lowest of equals: z f32 [4, rows] -> int64 [rows]."""
    score = half[:, None].expand(256, z.shape[1])
    for i in range(4):
        score = (z[i].double() * values[:, i, None].double() + score.double()).float()
    return score.argmax(0)


def _decode(byte: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The byte, 0 where the scale is 0, its values [4, rows] and decoded weights."""
    byte = torch.where(scale > 0, byte, 0)
    c = values[byte].T
    return byte, c, (c * scale).bfloat16().float()


def _walk(
    work: Tensor, upper: Tensor, inverse: Tensor, metric: Tensor, half: Tensor, values: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bytes [16, rows], decoded, err [64, rows] and sum err^2 [rows] of a group at one scale."""
    codes, decoded, errors = torch.empty((16, work.shape[1]), dtype=torch.int64), torch.empty_like(work), torch.empty_like(work)
    reciprocal = torch.where(scale > 0, 1 / scale, 0)
    for b in range(16):
        four = slice(4 * b, 4 * b + 4)
        byte = best_bytes(_times(work[four], metric[b]) * reciprocal, values, half[b])
        codes[b], _, decoded[four] = _decode(byte, values, scale)
        errors[four] = _times(work[four] - decoded[four], inverse[b])
        for j in range(4 * b, 4 * b + 4):
            work[four.stop :] -= errors[j] * upper[j, four.stop :, None]
    return codes, decoded, errors, sum_in_order(errors.T.square())


def descend_group(
    gradient: Tensor, curvature: Tensor, metric: Tensor, half: Tensor, values: Tensor, super_scale: Tensor,
    codes: Tensor, local_scale: Tensor, decoded: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes [16, rows], local scales [rows] and decoded [64, rows] after one pass over a group; nothing given is changed."""
    g, q, byte, local = gradient.clone(), decoded.clone(), codes.long(), local_scale.float()
    scale = _product(local, super_scale)
    reciprocal, c = torch.where(scale > 0, 1 / scale, 0), torch.empty_like(q)
    for b in range(16):
        four = slice(4 * b, 4 * b + 4)
        found = best_bytes((_times(q[four], metric[b]) - g[four]) * reciprocal, values, half[b])
        found, of_found, new = _decode(found, values, scale)
        change = new - q[four]
        better = sum_in_order((change * ((g[four] + g[four]) + _times(change, metric[b]))).T) < 0
        for j in range(4 * b, 4 * b + 4):
            g += torch.where(better, change[j - 4 * b], 0) * curvature[j, :, None]
        c[four] = torch.where(better, of_found, values[byte[b]].T)
        q[four], byte[b] = torch.where(better, new, q[four]), torch.where(better, found, byte[b])
    for step in DESCENT_STEPS:
        moved = (local + step).clamp(0, MAX_LOCAL)
        new = (c * _product(moved, super_scale)).bfloat16().float()
        local = torch.where(take_better(g, q, slice(0, GROUP), new, curvature), moved, local)
    return torch.where(local > 0, byte, 0).to(torch.uint8), local.to(torch.uint8), q
