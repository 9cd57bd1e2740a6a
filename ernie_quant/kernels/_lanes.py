"""Steps that the loops of feedback and descent share: rows lie side by side, f32 [..., lanes], inputs below each other."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

F = np.float32
LANES = 64  # rows: a block of 64 inputs takes 16 KB, so that it and its errors fit the processor's first cache


@compiled()
def round_row(x, bits):  # type: ignore[no-untyped-def]
    """f32 [lanes] rounded to bf16 in place, half to even; bits is x as uint32."""
    for v in range(x.size):
        bits[v] = (bits[v] + np.uint32(0x7FFF) + ((bits[v] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@compiled()
def less_one(work, error, row, first, last):  # type: ignore[no-untyped-def]
    """work[k] -= error * row[k] for inputs k from first to before last: work f32 [inputs, lanes], row f32 [inputs]."""
    for k in range(first, last):
        w, u = work[k], row[k]
        for v in range(error.size):
            w[v] -= error[v] * u


@compiled()
def less_four(work, errors, rows, first, last):  # type: ignore[no-untyped-def]
    """As four times `less_one`, for errors f32 [4, LANES] and rows f32 [4, inputs], in that order: the same bits.

    Four inputs at a time, so that what is loaded is used four times; in flat arrays at distances that the compiler knows, or it
    finds too many pairs of rows that might overlap, and vectorizes nothing.
    """
    flat, e, k = work.reshape(work.size), errors.reshape(errors.size), first
    while k + 4 <= last:
        w = flat[k * LANES : (k + 4) * LANES]
        a0, a1, a2, a3 = rows[0, k], rows[0, k + 1], rows[0, k + 2], rows[0, k + 3]
        b0, b1, b2, b3 = rows[1, k], rows[1, k + 1], rows[1, k + 2], rows[1, k + 3]
        c0, c1, c2, c3 = rows[2, k], rows[2, k + 1], rows[2, k + 2], rows[2, k + 3]
        d0, d1, d2, d3 = rows[3, k], rows[3, k + 1], rows[3, k + 2], rows[3, k + 3]
        for v in range(LANES):
            a, b, c, d = e[v], e[v + LANES], e[v + 2 * LANES], e[v + 3 * LANES]
            w[v] = (((w[v] - a * a0) - b * b0) - c * c0) - d * d0
            w[v + LANES] = (((w[v + LANES] - a * a1) - b * b1) - c * c1) - d * d1
            w[v + 2 * LANES] = (((w[v + 2 * LANES] - a * a2) - b * b2) - c * c2) - d * d2
            w[v + 3 * LANES] = (((w[v + 3 * LANES] - a * a3) - b * b3) - c * c3) - d * d3
        k += 4
    for i in range(4):
        less_one(work, errors[i], rows[i], k, last)


@compiled()
def less_all(work, errors, rows, first, last):  # type: ignore[no-untyped-def]
    """As `less_one` for every row of errors f32 [m, lanes] and of rows f32 [m, inputs]."""
    for i in range(0, len(errors) - 3, 4):
        less_four(work, errors[i : i + 4], rows[i : i + 4], first, last)
    for i in range(len(errors) // 4 * 4, len(errors)):
        less_one(work, errors[i], rows[i], first, last)


@compiled()
def keep(always, total, least, scale, chosen, trial, best):  # type: ignore[no-untyped-def]
    """Lanes in which the trial has less error than the best so far: trial and best f32 [fields, inputs, lanes]."""
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
def take_better(g, q, lo, new, less, along, loss):  # type: ignore[no-untyped-def]
    """Lanes in which d . (2 G + d H) < 0 for a change d of inputs from lo on: q follows to `new`, g by `along`.

    g, q and along = d H are f32 [block, lanes], new and less = -d f32 [inputs, lanes]; -> loss f32 [lanes].
    """
    for v in range(loss.size):
        loss[v] = F(0)
    for j in range(len(new)):
        for v in range(loss.size):
            loss[v] -= less[j, v] * ((g[lo + j, v] + g[lo + j, v]) + along[lo + j, v])
    for j in range(len(new)):
        for v in range(loss.size):
            q[lo + j, v] = new[j, v] if loss[v] < 0 else q[lo + j, v]
    for j in range(len(g)):
        for v in range(loss.size):
            g[j, v] = g[j, v] + along[j, v] if loss[v] < 0 else g[j, v]
