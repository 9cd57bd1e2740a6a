"""The search of WINT2's scales, row by row, compiled: the same steps as in ccq_reference, which has the reasons."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels.ccq_bytes import nearest_bytes, round_bf16
from ernie_quant.kernels.ccq_scores import gains, place, placed_gains

F = np.float32


@compiled()
def _multiply(local, super_scale, scale):  # type: ignore[no-untyped-def]
    """scale f32 [groups] = bf16(local * super_scale), local int64 [groups]."""
    for g in range(local.size):
        scale[g] = F(local[g]) * super_scale
    round_bf16(scale)


@compiled()
def _liked_scales(planes, energy, probes, table, scratch, liked, gain):  # type: ignore[no-untyped-def]
    """The best of `probes` scales for each group, into liked f32 [groups], and its energy |w|^2, into energy f64 [groups]."""
    groups = liked.size
    low, high, best, scale = np.empty(groups), np.empty(groups), np.zeros(groups), np.empty(groups, F)
    for g in range(groups):
        energy[g], peak = 0.0, 0.0
        for v in range(16 * g, 16 * g + 16):
            for i in range(4):
                w = np.float64(planes[i, v])
                energy[g] += w * w
                peak = max(peak, abs(w))
        rms = np.sqrt(energy[g] / 64)
        low[g] = rms / 19
        high[g] = max(rms / 11, peak / 31)
        liked[g] = low[g]
    round_bf16(liked)
    for i in range(probes):
        for g in range(groups):
            scale[g] = low[g] + (high[g] - low[g]) * (i / (probes - 1))
        round_bf16(scale)
        gains(planes, scale, table, scratch, gain)
        for g in range(groups):
            if gain[g] > best[g]:
                best[g], liked[g] = gain[g], scale[g]


@compiled()
def _super_scale(liked, energy, factors):  # type: ignore[no-untyped-def]
    """The f32 (rounded to bf16) whose multiples 1 to 15 lie nearest to the liked scales."""
    loudest = np.float64(0)
    for g in range(liked.size):
        loudest = max(loudest, np.float64(liked[g]))
    chosen, least, ideal = F(0), np.inf, np.empty(1, F)
    for factor in factors:
        ideal[0] = loudest * factor
        round_bf16(ideal)
        multiple = np.float64(ideal[0])
        loss = 0.0
        for g in range(liked.size):
            if liked[g] > 0:
                like = np.float64(liked[g])
                miss = min(max(np.rint(like / multiple), 1.0), 15.0) * multiple / like - 1
                loss += energy[g] * min(miss * miss, 1.0)
        if loss < least:
            least, chosen = loss, ideal[0]
    return chosen


@compiled()
def _best_locals(planes, super_scale, around, known, steps, table, scratch, local, best_gain):  # type: ignore[no-untyped-def]
    """Local scales near `around` (gain `known`), into local int64 [groups] and best_gain f64 [groups]; returns its sum."""
    groups = around.size
    trial, scale, gain = np.empty(groups, np.int64), np.empty(groups, F), np.empty(groups)
    for g in range(groups):
        best_gain[g] = max(known[g], 0.0)
        local[g] = around[g] if known[g] > 0 else 0
    for step in steps:
        for g in range(groups):
            trial[g] = min(max(around[g] + step, 0), 15)
        _multiply(trial, super_scale, scale)
        gains(planes, scale, table, scratch, gain)
        for g in range(groups):
            if gain[g] > best_gain[g]:
                best_gain[g], local[g] = gain[g], trial[g]
    total = 0.0
    for g in range(groups):
        total += best_gain[g]
    return total


@compiled()
def search(weight, tables, factors, steps, probes, finalists, codes, local_scale, super_scale, pair):  # type: ignore[no-untyped-def]
    """Scales, pair and bytes of every row of a weight f32 [out, in] in stored order, into the last four arrays."""
    rows, width = weight.shape
    groups, pairs = width // 64, len(tables)
    planes, scratch = np.empty((4, width // 4), F), np.empty((6, width // 4), F)
    energy, liked, scale = np.empty(groups), np.empty(groups, F), np.empty(groups, F)
    gain, best_gain, total = np.empty((pairs, groups)), np.empty(groups), np.empty(pairs)
    start, local = np.empty(groups, np.int64), np.empty(groups, np.int64)
    for row in range(rows):
        for v in range(width // 4):
            for i in range(4):
                planes[i, v] = weight[row, 4 * v + i]
        _liked_scales(planes, energy, probes, tables[0], scratch, liked, best_gain)
        top = _super_scale(liked, energy, factors)
        for g in range(groups):
            k = np.float64(liked[g]) / np.float64(top) if liked[g] > 0 else 0.0
            local[g] = np.int64(min(np.rint(k), 15.0))
        _multiply(local, top, scale)
        gains(planes, scale, tables[0], scratch, best_gain)
        _best_locals(planes, top, local, best_gain, steps[:2], tables[0], scratch, start, gain[0])

        # every pair at these local scales, then the local scales again for the best of them
        _multiply(start, top, scale)
        place(planes, scale, scratch)
        for p in range(pairs):
            if p > 0:
                placed_gains(scale, tables[p], scratch, gain[p])
            total[p] = 0
            for g in range(groups):
                total[p] += gain[p, g]
        best = -1.0
        for _ in range(min(finalists, pairs)):
            choice = np.argmax(total)  # the first of equals
            total[choice] = -np.inf
            explained = _best_locals(planes, top, start, gain[choice], steps, tables[choice], scratch, local, best_gain)
            if explained > best:
                best, pair[row] = explained, choice
                for g in range(groups):
                    local_scale[row, g] = local[g]
        for g in range(groups):
            local[g] = local_scale[row, g]
        super_scale[row] = top
        nearest_bytes(planes, top, local, tables[pair[row]], codes[row])
