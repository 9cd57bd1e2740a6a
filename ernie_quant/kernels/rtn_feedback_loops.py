"""The compiled loops of error feedback and descent for integers: one block of inputs, rows side by side; see rtn_feedback."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._lanes import LANES, keep, less_all, less_four, less_one, round_row, take_better
from ernie_quant.kernels.rtn import ROUND, SMALLEST

F = np.float32


@compiled()
def _scale_row(scale, bits):  # type: ignore[no-untyped-def]
    """Rounded to bf16; what is too small for a scale, or no number, becomes 1."""
    round_row(scale, bits)
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
def _decode(codes, scale, decoded):  # type: ignore[no-untyped-def]
    """bf16(code * scale): codes f32 [inputs, lanes]."""
    bits = decoded.view(np.uint32)
    for j in range(len(codes)):
        for v in range(scale.size):
            decoded[j, v] = codes[j, v] * scale[v]
        round_row(decoded[j], bits[j])


@compiled()
def _walk(work, upper, inverse, scale, low, high, trial, total):  # type: ignore[no-untyped-def]
    """One group with feedback at one scale: work f32 [group, lanes] is used up -> codes, decoded, err in trial, sum err^2."""
    n, lanes = work.shape
    codes, decoded, errors = trial[0], trial[1], trial[2]
    bits, reciprocal = decoded.view(np.uint32), np.empty(lanes, F)
    for v in range(lanes):
        total[v] = F(0)
        reciprocal[v] = F(1) / scale[v]
    for four in range(0, n, 4):  # later inputs lose the errors of four at a time
        last = min(four + 4, n)
        for j in range(four, last):
            w, c, q, e = work[j], codes[j], decoded[j], errors[j]
            for v in range(lanes):
                c[v] = (min(max(w[v] * reciprocal[v], low), high) + ROUND) - ROUND
                q[v] = c[v] * scale[v]
            round_row(q, bits[j])
            for v in range(lanes):
                e[v] = (w[v] - q[v]) * inverse[j]
                total[v] += e[v] * e[v]
            less_one(work, e, upper[j], j + 1, last)
        if last < n:
            less_four(work, errors[four:last], upper[four:last], last, n)


@compiled()
def feedback_block(  # type: ignore[no-untyped-def]
    weight, upper, inverse, group, ratios, low, high, divisor, signed, codes, scale, decoded, errors
):
    """The groups of a block one after the other, each at the best of its scales (the given one where there are no ratios).

    weight f32 [block, rows], upper f32 [block, block], inverse of its diagonal; scale f32 [groups, rows] -> codes int8, decoded
    and errors f32 [block, rows].
    """
    n, rows = weight.shape
    work, spent = np.empty((n, LANES), F), np.empty((group, LANES), F)
    trial, best, lane = np.empty((3, group, LANES), F), np.empty((3, group, LANES), F), np.empty((5, LANES), F)
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
                spent[:] = work[lo:hi]
                _walk(spent, upper[lo:hi, lo:hi], inverse[lo:hi], at, low, high, trial, total)
                keep(k == 0, total, least, at, chosen, trial, best)
            less_all(work, best[2], upper[lo:hi], hi, n)
            scale[g, lanes] = chosen
            decoded[lo:hi, lanes] = best[1]
            errors[lo:hi, lanes] = best[2]
            for j in range(group):
                for v in range(LANES):
                    codes[lo + j, first + v] = np.int8(best[0, j, v])


@compiled()
def descend_block(  # type: ignore[no-untyped-def]
    gradient, curvature, inverse, group, low, high, rescale, codes, scale, decoded, change
):
    """Codes of a block, one input at a time, then each group's scale if `rescale`: -> change of decoded.

    gradient f32 [block, rows] stays; curvature f32 [block, block], inverse of its diagonal; the rest as in `feedback_block`.
    """
    n, rows = gradient.shape
    g, c, q = np.empty((n, LANES), F), np.empty((n, LANES), F), np.empty((n, LANES), F)
    lane, work = np.empty((3, LANES), F), np.empty((3, n, LANES), F)
    for first in range(0, rows, LANES):
        lanes = slice(first, first + LANES)
        g[:] = gradient[:, lanes]
        q[:] = decoded[:, lanes]
        for j in range(n):
            for v in range(LANES):
                c[j, v] = F(codes[j, first + v])
        for i in range(n // group):
            lo, hi = i * group, (i + 1) * group
            _descend_codes(g, c, q, scale[i, lanes], curvature, inverse, low, high, lo, hi)
            if rescale:
                _rescale(g, c[lo:hi], q, scale[i, lanes], curvature, lo, work, lane)
        for j in range(n):
            for v in range(LANES):
                codes[j, first + v] = np.int8(c[j, v])
                change[j, first + v] = q[j, v] - decoded[j, first + v]
            decoded[j, lanes] = q[j]


@compiled()
def _descend_codes(g, c, q, scale, curvature, inverse, low, high, lo, hi):  # type: ignore[no-untyped-def]
    """Inputs lo to hi: the code nearest to where the loss is least along this input, if what it decodes to is nearer."""
    n, less, t, reciprocal = len(g), np.empty((4, scale.size), F), np.empty(scale.size, F), np.empty(scale.size, F)
    bits = t.view(np.uint32)
    for v in range(scale.size):
        reciprocal[v] = F(1) / scale[v]
    for four in range(lo, hi, 4):  # other inputs follow the changes of four at a time
        last = min(four + 4, hi)
        for j in range(four, last):
            gj, cj, qj, d = g[j], c[j], q[j], less[j - four]
            for v in range(scale.size):
                aim = qj[v] - gj[v] * inverse[j]
                t[v] = ((min(max(aim * reciprocal[v], low), high) + ROUND) - ROUND) * scale[v]
            round_row(t, bits)
            for v in range(scale.size):
                step = gj[v] * inverse[j]
                aim = qj[v] - step
                better = abs(t[v] - aim) < abs(step)
                code = (min(max(aim * reciprocal[v], low), high) + ROUND) - ROUND
                cj[v] = code if better else cj[v]
                d[v] = qj[v] - t[v] if better else F(0)
                qj[v] = t[v] if better else qj[v]
            less_one(g, d, curvature[j], four, last)
        less_all(g, less[: last - four], curvature[four:last], 0, four)
        less_all(g, less[: last - four], curvature[four:last], last, n)


@compiled()
def _rescale(g, c, q, scale, curvature, lo, work, lane):  # type: ignore[no-untyped-def]
    """s - (c . G) / (c H c) as stored, where the loss falls with it; c f32 [group, lanes] are the codes of inputs from lo on."""
    hi = lo + len(c)
    new, less, along = work[0, : len(c)], work[1, : len(c)], work[2]
    moved, up, down = lane[0], lane[1], lane[2]
    along[:] = 0
    less_all(along, c, curvature[lo:hi], lo, hi)  # -c H
    for v in range(moved.size):
        up[v], down[v] = F(0), F(0)
    for j in range(len(c)):
        for v in range(moved.size):
            up[v] += c[j, v] * g[lo + j, v]
            down[v] -= c[j, v] * along[lo + j, v]
    for v in range(moved.size):
        moved[v] = scale[v] - up[v] / down[v] if down[v] > 0 else scale[v]
    _scale_row(moved, moved.view(np.uint32))
    _decode(c, moved, new)
    for j in range(len(c)):
        for v in range(moved.size):
            less[j, v] = q[lo + j, v] - new[j, v]
    along[:] = 0
    less_all(along, less, curvature[lo:hi], 0, len(g))
    take_better(g, q, lo, new, less, along, up)
    for v in range(moved.size):
        scale[v] = moved[v] if up[v] < 0 else scale[v]
