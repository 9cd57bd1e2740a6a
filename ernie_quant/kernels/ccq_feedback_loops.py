"""The compiled loops of WINT2's error feedback and descent: one group of 64 inputs, rows side by side; see ccq_feedback."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

F = np.float32
GROUP, LANES, MAX_LOCAL = 64, 64, 15
ROUND = F(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even


@compiled()
def _round_row(x, bits):  # type: ignore[no-untyped-def]
    """f32 [n] rounded to bf16 in place, half to even; bits is x as uint32."""
    for v in range(x.size):
        bits[v] = (bits[v] + np.uint32(0x7FFF) + ((bits[v] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@compiled()
def _halves(values, metric, out):  # type: ignore[no-untyped-def]
    """-c A c^T / 2 of all bytes: values f32 [256, 4], metric f32 [4, 4] -> f32 [256]."""
    for k in range(256):
        total = F(0)
        for i in range(4):
            along = F(0)
            for m in range(4):
                along += values[k, m] * metric[m, i]
            total += along * values[k, i]
        out[k] = F(-0.5) * total


@compiled()
def _best_bytes(z, values, halves, best, byte):  # type: ignore[no-untyped-def]
    """The bytes with the largest z . c + half, the lowest of equals: z f32 [4, lanes] -> best f32, byte int32 [lanes]."""
    z0, z1, z2, z3 = z[0], z[1], z[2], z[3]
    for v in range(best.size):
        best[v], byte[v] = F(-np.inf), np.int32(0)
    for k in range(0, 256, 4):  # four at a time, so that z is loaded once for all
        p0, p1, p2, p3, ph = values[k, 0], values[k, 1], values[k, 2], values[k, 3], halves[k]
        q0, q1, q2, q3, qh = values[k + 1, 0], values[k + 1, 1], values[k + 1, 2], values[k + 1, 3], halves[k + 1]
        r0, r1, r2, r3, rh = values[k + 2, 0], values[k + 2, 1], values[k + 2, 2], values[k + 2, 3], halves[k + 2]
        s0, s1, s2, s3, sh = values[k + 3, 0], values[k + 3, 1], values[k + 3, 2], values[k + 3, 3], halves[k + 3]
        at = np.int32(k)
        for v in range(best.size):
            a0, a1, a2, a3 = z0[v], z1[v], z2[v], z3[v]
            p = (((a0 * p0 + ph) + a1 * p1) + a2 * p2) + a3 * p3
            q = (((a0 * q0 + qh) + a1 * q1) + a2 * q2) + a3 * q3
            r = (((a0 * r0 + rh) + a1 * r1) + a2 * r2) + a3 * r3
            s = (((a0 * s0 + sh) + a1 * s1) + a2 * s2) + a3 * s3
            i = at + np.int32(1) if q > p else at
            p = q if q > p else p
            j = at + np.int32(3) if s > r else at + np.int32(2)
            r = s if s > r else r
            i = j if r > p else i
            p = r if r > p else p
            byte[v] = i if p > best[v] else byte[v]
            best[v] = p if p > best[v] else best[v]


@compiled()
def _scales(local, super_scale, scale, inverse):  # type: ignore[no-untyped-def]
    """bf16(local * super) and one over it, 0 for 0; local f32 [lanes]."""
    for v in range(scale.size):
        scale[v] = local[v] * super_scale[v]
    _round_row(scale, scale.view(np.uint32))
    for v in range(scale.size):
        inverse[v] = F(1) / scale[v] if scale[v] > 0 else F(0)


@compiled()
def _decode_four(values, byte, scale, c, q):  # type: ignore[no-untyped-def]
    """Values c f32 [4, lanes] and decoded weights q of bytes; byte becomes 0 where the scale is."""
    bits = q.view(np.uint32)
    for v in range(scale.size):
        byte[v] = byte[v] if scale[v] > 0 else np.int32(0)
    for i in range(4):
        for v in range(scale.size):
            c[i, v] = values[byte[v], i]
        for v in range(scale.size):
            q[i, v] = c[i, v] * scale[v]
        _round_row(q[i], bits[i])


@compiled()
def _times(x, matrix, out):  # type: ignore[no-untyped-def]
    """x f32 [4, lanes], matrix f32 [4, 4]: out[i] = sum over m of x[m] * matrix[m, i]."""
    for i in range(4):
        o, m0, m1, m2, m3 = out[i], matrix[0, i], matrix[1, i], matrix[2, i], matrix[3, i]
        for v in range(x.shape[1]):
            o[v] = ((x[0, v] * m0 + x[1, v] * m1) + x[2, v] * m2) + x[3, v] * m3


@compiled()
def _walk(work, upper, inverse, metric, values, halves, scale, reciprocal, codes, decoded, errors, total):  # type: ignore[no-untyped-def]
    """A group with feedback at one scale: work f32 [64, lanes] is used up -> codes int32 [16, lanes], decoded, err, sum err^2."""
    lanes = scale.size
    z, best = np.empty((4, lanes), F), np.empty(lanes, F)
    for v in range(lanes):
        total[v] = F(0)
    for b in range(16):
        w, q, e = work[4 * b : 4 * b + 4], decoded[4 * b : 4 * b + 4], errors[4 * b : 4 * b + 4]
        _times(w, metric[b], z)
        for i in range(4):
            for v in range(lanes):
                z[i, v] *= reciprocal[v]
        _best_bytes(z, values, halves[b], best, codes[b])
        _decode_four(values, codes[b], scale, z, q)
        for i in range(4):
            for v in range(lanes):
                z[i, v] = w[i, v] - q[i, v]
        _times(z, inverse[b], e)
        for i in range(4):
            for v in range(lanes):
                total[v] += e[i, v] * e[i, v]
        _less(work, e, upper[4 * b : 4 * b + 4], 4 * b + 4)


@compiled()
def _less(work, e, upper, first):  # type: ignore[no-untyped-def]
    """work[k] -= sum over i of e[i] * upper[i, k] from the input `first` on."""
    e0, e1, e2, e3 = e[0], e[1], e[2], e[3]
    for k in range(first, len(work)):
        w, u0, u1, u2, u3 = work[k], upper[0, k], upper[1, k], upper[2, k], upper[3, k]
        for v in range(e0.size):
            w[v] = (((w[v] - e0[v] * u0) - e1[v] * u1) - e2[v] * u2) - e3[v] * u3


@compiled()
def feedback_group(  # type: ignore[no-untyped-def]
    weight, upper, inverse, metric, values, code_rms, steps, super_scale, codes, local_scale, decoded, errors
):
    """The local scale with the least sum err^2 and its bytes: weight f32 [64, rows] -> codes uint8 [16, rows] and the rest."""
    halves, lane = np.empty((16, 256), F), np.empty((7, LANES), F)
    around, local, scale, reciprocal, total, least, chosen = lane[0], lane[1], lane[2], lane[3], lane[4], lane[5], lane[6]
    trial, best = np.empty((2, GROUP, LANES), F), np.empty((2, GROUP, LANES), F)
    work, byte, best_byte = np.empty((GROUP, LANES), F), np.empty((16, LANES), np.int32), np.empty((16, LANES), np.int32)
    for b in range(16):
        _halves(values, metric[b], halves[b])
    for first in range(0, weight.shape[1], LANES):
        lanes = slice(first, first + LANES)
        _around(weight[:, lanes], super_scale[lanes], code_rms, around)
        for k in range(steps.size):
            for v in range(LANES):
                local[v] = min(max(around[v] + F(steps[k]), F(0)), F(MAX_LOCAL))
            _scales(local, super_scale[lanes], scale, reciprocal)
            work[:] = weight[:, lanes]
            _walk(work, upper, inverse, metric, values, halves, scale, reciprocal, byte, trial[0], trial[1], total)
            _keep(k == 0, total, least, local, chosen, trial, best, byte, best_byte)
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


@compiled()
def _keep(always, total, least, local, chosen, trial, best, byte, best_byte):  # type: ignore[no-untyped-def]
    """Lanes in which the trial has less error than the best so far."""
    for i in range(2):
        for j in range(GROUP):
            to, new = best[i, j], trial[i, j]
            for v in range(total.size):
                to[v] = new[v] if always or total[v] < least[v] else to[v]
    for b in range(16):
        for v in range(total.size):
            best_byte[b, v] = byte[b, v] if always or total[v] < least[v] else best_byte[b, v]
    for v in range(total.size):
        better = always or total[v] < least[v]
        chosen[v] = local[v] if better else chosen[v]
        least[v] = total[v] if better else least[v]


@compiled()
def descend_group(  # type: ignore[no-untyped-def]
    gradient, curvature, metric, values, steps, super_scale, codes, local_scale, decoded, change
):
    """Bytes of a group, then its local scale: gradient f32 [64, rows], which stays -> change of decoded."""
    halves, lane = np.empty((16, 256), F), np.empty((4, LANES), F)
    g, q, c = np.empty((GROUP, LANES), F), np.empty((GROUP, LANES), F), np.empty((GROUP, LANES), F)
    trial, local, byte = np.empty((3, GROUP, LANES), F), np.empty(LANES, F), np.empty((16, LANES), np.int32)
    for b in range(16):
        _halves(values, metric[b], halves[b])
    for first in range(0, gradient.shape[1], LANES):
        lanes = slice(first, first + LANES)
        g[:] = gradient[:, lanes]
        q[:] = decoded[:, lanes]
        for v in range(LANES):
            local[v] = F(local_scale[first + v])
        _scales(local, super_scale[lanes], lane[0], lane[1])
        for b in range(16):
            for v in range(LANES):
                byte[b, v] = np.int32(codes[b, first + v])
            _descend_byte(g, q, c, b, curvature, metric[b], values, halves[b], lane, byte[b], trial)
        for k in range(steps.size):
            _step_local(g, q, c, curvature, F(steps[k]), super_scale[lanes], local, lane, trial)
        for v in range(LANES):
            local_scale[first + v] = np.uint8(local[v])
        for b in range(16):
            for v in range(LANES):  # of bytes that decode alike the lowest, as everywhere
                codes[b, first + v] = np.uint8(byte[b, v]) if local[v] > 0 else np.uint8(0)
        for j in range(GROUP):
            for v in range(LANES):
                change[j, first + v] = q[j, v] - decoded[j, first + v]
            decoded[j, lanes] = q[j]


@compiled()
def _descend_byte(g, q, c, b, curvature, metric, values, halves, lane, byte, trial):  # type: ignore[no-untyped-def]
    """The byte nearest to the optimum of its four inputs, if the loss falls: d . (2 G + d H_bb) < 0."""
    scale, reciprocal, best, loss = lane[0], lane[1], lane[2], lane[3]
    z, new, d = trial[0, :4], trial[1, :4], trial[2, :4]
    values_new, found = trial[1, 4:8], np.empty(best.size, np.int32)
    mine, mine_g, mine_c = q[4 * b : 4 * b + 4], g[4 * b : 4 * b + 4], c[4 * b : 4 * b + 4]
    _times(mine, metric, z)
    for i in range(4):
        for v in range(best.size):
            z[i, v] = (z[i, v] - mine_g[i, v]) * reciprocal[v]
    _best_bytes(z, values, halves, best, found)
    _decode_four(values, found, scale, values_new, new)
    for i in range(4):
        for v in range(best.size):
            d[i, v] = new[i, v] - mine[i, v]
            mine_c[i, v] = values[byte[v], i]
    _times(d, metric, z)
    for v in range(best.size):
        loss[v] = F(0)
    for i in range(4):
        for v in range(best.size):
            loss[v] += d[i, v] * ((mine_g[i, v] + mine_g[i, v]) + z[i, v])
    for v in range(best.size):
        byte[v] = found[v] if loss[v] < 0 else byte[v]
    for i in range(4):
        for v in range(best.size):
            mine[i, v] = new[i, v] if loss[v] < 0 else mine[i, v]
            mine_c[i, v] = values_new[i, v] if loss[v] < 0 else mine_c[i, v]
            d[i, v] = -d[i, v] if loss[v] < 0 else F(0)
    _less(g, d, curvature[4 * b : 4 * b + 4], 0)


@compiled()
def _step_local(g, q, c, curvature, step, super_scale, local, lane, trial):  # type: ignore[no-untyped-def]
    """The local scale one step on, if the loss falls."""
    scale, reciprocal, moved, loss = lane[0], lane[1], lane[2], lane[3]
    t, d, along = trial[0], trial[1], trial[2]
    for v in range(moved.size):
        moved[v] = min(max(local[v] + step, F(0)), F(MAX_LOCAL))
        loss[v] = F(0)
    _scales(moved, super_scale, scale, reciprocal)
    for j in range(GROUP):
        for v in range(moved.size):
            t[j, v] = c[j, v] * scale[v]
            along[j, v] = F(0)
        _round_row(t[j], t[j].view(np.uint32))
        for v in range(moved.size):
            d[j, v] = q[j, v] - t[j, v]
    for b in range(0, GROUP, 4):
        _less(along, d[b : b + 4], curvature[b : b + 4], 0)
    for j in range(GROUP):
        for v in range(moved.size):
            loss[v] += -d[j, v] * ((g[j, v] + g[j, v]) + along[j, v])
    for v in range(moved.size):
        local[v] = moved[v] if loss[v] < 0 else local[v]
    for j in range(GROUP):
        for v in range(moved.size):
            q[j, v] = t[j, v] if loss[v] < 0 else q[j, v]
            d[j, v] = d[j, v] if loss[v] < 0 else F(0)
    for b in range(0, GROUP, 4):
        _less(g, d[b : b + 4], curvature[b : b + 4], 0)
