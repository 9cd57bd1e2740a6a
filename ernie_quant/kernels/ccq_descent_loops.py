"""The compiled loops of WINT2's descent: one group of 64 inputs, rows side by side; see ccq_feedback."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._lanes import LANES, less_all, less_four, round_row, take_better
from ernie_quant.kernels.ccq_feedback_loops import GROUP, MAX_LOCAL, best_bytes, decode_four, scales, times

F = np.float32


@compiled()
def descend_group(  # type: ignore[no-untyped-def]
    gradient, curvature, metric, half, values, steps, super_scale, codes, local_scale, decoded, change
):
    """Bytes of a group, then its local scale: gradient f32 [64, rows], which stays -> change of decoded."""
    lane = np.empty((4, LANES), F)
    g, q, c = np.empty((GROUP, LANES), F), np.empty((GROUP, LANES), F), np.empty((GROUP, LANES), F)
    trial, local, byte = np.empty((3, GROUP, LANES), F), np.empty(LANES, F), np.empty((16, LANES), np.int32)
    for first in range(0, gradient.shape[1], LANES):
        lanes = slice(first, first + LANES)
        g[:] = gradient[:, lanes]
        q[:] = decoded[:, lanes]
        for v in range(LANES):
            local[v] = F(local_scale[first + v])
        scales(local, super_scale[lanes], lane[0], lane[1])
        for b in range(16):
            for v in range(LANES):
                byte[b, v] = np.int32(codes[b, first + v])
            _descend_byte(g, q, c, b, curvature, metric[b], values, half[b], lane, byte[b], trial)
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
def _descend_byte(g, q, c, b, curvature, metric, values, half, lane, byte, trial):  # type: ignore[no-untyped-def]
    """The byte nearest to the optimum of its four inputs, if the loss falls: d . (2 G + d H_bb) < 0."""
    scale, reciprocal, best, loss = lane[0], lane[1], lane[2], lane[3]
    z, new, d = trial[0, :4], trial[1, :4], trial[2, :4]
    values_new, found = trial[1, 4:8], np.empty(best.size, np.int32)
    mine, mine_g, mine_c = q[4 * b : 4 * b + 4], g[4 * b : 4 * b + 4], c[4 * b : 4 * b + 4]
    times(mine, metric, z)
    for i in range(4):
        for v in range(best.size):
            z[i, v] = (z[i, v] - mine_g[i, v]) * reciprocal[v]
    best_bytes(z, values, half, best, found)
    decode_four(values, found, scale, values_new, new)
    for i in range(4):
        for v in range(best.size):
            d[i, v] = new[i, v] - mine[i, v]
            mine_c[i, v] = values[byte[v], i]
    times(d, metric, z)
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
    less_four(g, d, curvature[4 * b : 4 * b + 4], 0, GROUP)


@compiled()
def _step_local(g, q, c, curvature, step, super_scale, local, lane, trial):  # type: ignore[no-untyped-def]
    """The local scale one step on, if the loss falls."""
    scale, reciprocal, moved, loss = lane[0], lane[1], lane[2], lane[3]
    new, less, along = trial[0], trial[1], trial[2]
    for v in range(moved.size):
        moved[v] = min(max(local[v] + step, F(0)), F(MAX_LOCAL))
    scales(moved, super_scale, scale, reciprocal)
    bits = new.view(np.uint32)
    for j in range(GROUP):
        _decode_row(c[j], q[j], scale, new[j], bits[j], less[j])
    along[:] = 0
    less_all(along, less, curvature, 0, GROUP)
    take_better(g, q, 0, new, less, along, loss)
    for v in range(moved.size):
        local[v] = moved[v] if loss[v] < 0 else local[v]


@compiled()
def _decode_row(c, q, scale, new, bits, less):  # type: ignore[no-untyped-def]
    """bf16(c * scale), and how much less it is than q."""
    for v in range(scale.size):
        new[v] = c[v] * scale[v]
    round_row(new, bits)
    for v in range(scale.size):
        less[v] = q[v] - new[v]
