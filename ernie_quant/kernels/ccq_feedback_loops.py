"""The compiled loops of WINT2's error feedback: one group of 64 inputs, rows side by side; see ccq_feedback."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._lanes import LANES, keep, less_four, round_row
from ernie_quant.kernels.rtn import ROUND

F = np.float32
GROUP, MAX_LOCAL = 64, 15


# "contract" allows fused multiply-add, half the operations: all four are fused or, where the processor has none, none is
@compiled(fastmath={"contract"})
def best_bytes(z, values, half, best, byte):  # type: ignore[no-untyped-def]
    """The bytes with the largest z . c + half, the lowest of equals: z f32 [4, lanes] -> best f32, byte int32 [lanes]."""
    z0, z1, z2, z3 = z[0], z[1], z[2], z[3]
    for v in range(best.size):
        best[v], byte[v] = F(-np.inf), np.int32(0)
    for k in range(0, 256, 4):  # four at a time, so that z is loaded once for all
        p0, p1, p2, p3, ph = values[k, 0], values[k, 1], values[k, 2], values[k, 3], half[k]
        q0, q1, q2, q3, qh = values[k + 1, 0], values[k + 1, 1], values[k + 1, 2], values[k + 1, 3], half[k + 1]
        r0, r1, r2, r3, rh = values[k + 2, 0], values[k + 2, 1], values[k + 2, 2], values[k + 2, 3], half[k + 2]
        s0, s1, s2, s3, sh = values[k + 3, 0], values[k + 3, 1], values[k + 3, 2], values[k + 3, 3], half[k + 3]
        at = np.int32(k)
        for v in range(best.size):
            a0, a1, a2, a3 = z0[v], z1[v], z2[v], z3[v]
            p = a3 * p3 + (a2 * p2 + (a1 * p1 + (a0 * p0 + ph)))
            q = a3 * q3 + (a2 * q2 + (a1 * q1 + (a0 * q0 + qh)))
            r = a3 * r3 + (a2 * r2 + (a1 * r1 + (a0 * r0 + rh)))
            s = a3 * s3 + (a2 * s2 + (a1 * s1 + (a0 * s0 + sh)))
            i = at + np.int32(1) if q > p else at
            p = q if q > p else p
            j = at + np.int32(3) if s > r else at + np.int32(2)
            r = s if s > r else r
            i = j if r > p else i
            p = r if r > p else p
            byte[v] = i if p > best[v] else byte[v]
            best[v] = p if p > best[v] else best[v]


@compiled()
def scales(local, super_scale, scale, inverse):  # type: ignore[no-untyped-def]
    """bf16(local * super) and one over it, 0 for 0; local f32 [lanes]."""
    for v in range(scale.size):
        scale[v] = local[v] * super_scale[v]
    round_row(scale, scale.view(np.uint32))
    for v in range(scale.size):
        inverse[v] = F(1) / scale[v] if scale[v] > 0 else F(0)


@compiled()
def decode_four(values, byte, scale, c, q):  # type: ignore[no-untyped-def]
    """Values c f32 [4, lanes] and decoded weights q of bytes; byte becomes 0 where the scale is."""
    bits = q.view(np.uint32)
    for v in range(scale.size):
        byte[v] = byte[v] if scale[v] > 0 else np.int32(0)
    for i in range(4):
        for v in range(scale.size):
            c[i, v] = values[byte[v], i]
        for v in range(scale.size):
            q[i, v] = c[i, v] * scale[v]
        round_row(q[i], bits[i])


@compiled()
def times(x, matrix, out):  # type: ignore[no-untyped-def]
    """x f32 [4, lanes], matrix f32 [4, 4]: out[i] = sum over m of x[m] * matrix[m, i]."""
    for i in range(4):
        o, m0, m1, m2, m3 = out[i], matrix[0, i], matrix[1, i], matrix[2, i], matrix[3, i]
        for v in range(x.shape[1]):
            o[v] = ((x[0, v] * m0 + x[1, v] * m1) + x[2, v] * m2) + x[3, v] * m3


@compiled()
def _walk(work, upper, inverse, metric, values, half, scale, reciprocal, codes, decoded, errors, total):  # type: ignore[no-untyped-def]
    """A group with feedback at one scale: work f32 [64, lanes] is used up -> codes int32 [16, lanes], decoded, err, sum err^2."""
    lanes = scale.size
    z, best = np.empty((4, lanes), F), np.empty(lanes, F)
    for v in range(lanes):
        total[v] = F(0)
    for b in range(16):
        w, q, e = work[4 * b : 4 * b + 4], decoded[4 * b : 4 * b + 4], errors[4 * b : 4 * b + 4]
        times(w, metric[b], z)
        for i in range(4):
            for v in range(lanes):
                z[i, v] *= reciprocal[v]
        best_bytes(z, values, half[b], best, codes[b])
        decode_four(values, codes[b], scale, z, q)
        for i in range(4):
            for v in range(lanes):
                z[i, v] = w[i, v] - q[i, v]
        times(z, inverse[b], e)
        for i in range(4):
            for v in range(lanes):
                total[v] += e[i, v] * e[i, v]
        less_four(work, e, upper[4 * b : 4 * b + 4], 4 * b + 4, GROUP)


@compiled()
def feedback_group(  # type: ignore[no-untyped-def]
    weight, upper, inverse, metric, half, values, code_rms, steps, super_scale, codes, local_scale, decoded, errors
):
    """The local scale with the least sum err^2 and its bytes: weight f32 [64, rows] -> codes uint8 [16, rows] and the rest."""
    lane = np.empty((7, LANES), F)
    around, local, scale, reciprocal, total, least, chosen = lane[0], lane[1], lane[2], lane[3], lane[4], lane[5], lane[6]
    trial, best = np.empty((2, GROUP, LANES), F), np.empty((2, GROUP, LANES), F)
    work, byte, best_byte = np.empty((GROUP, LANES), F), np.empty((16, LANES), np.int32), np.empty((16, LANES), np.int32)
    for first in range(0, weight.shape[1], LANES):
        lanes = slice(first, first + LANES)
        _around(weight[:, lanes], super_scale[lanes], code_rms, around)
        for k in range(steps.size):
            for v in range(LANES):
                local[v] = min(max(around[v] + F(steps[k]), F(0)), F(MAX_LOCAL))
            scales(local, super_scale[lanes], scale, reciprocal)
            work[:] = weight[:, lanes]
            _walk(work, upper, inverse, metric, values, half, scale, reciprocal, byte, trial[0], trial[1], total)
            for b in range(16):
                for v in range(LANES):
                    best_byte[b, v] = byte[b, v] if k == 0 or total[v] < least[v] else best_byte[b, v]
            keep(k == 0, total, least, local, chosen, trial, best)
        for v in range(LANES):
            local_scale[first + v] = np.uint8(chosen[v])
        for b in range(16):
            for v in range(LANES):
                codes[b, first + v] = np.uint8(best_byte[b, v])
        decoded[:, lanes] = best[0]
        errors[:, lanes] = best[1]


@compiled()
def _around(weight, super_scale, code_rms, out):  # type: ignore[no-untyped-def]
    """round(rms / code_rms / super) of each lane, 0 for a row of zeros."""
    for v in range(out.size):
        out[v] = F(0)
    for j in range(GROUP):
        for v in range(out.size):
            out[v] += weight[j, v] * weight[j, v]
    for v in range(out.size):
        rms = np.sqrt(out[v] / F(GROUP))
        out[v] = ((rms / code_rms) / super_scale[v] + ROUND) - ROUND if super_scale[v] > 0 else F(0)
