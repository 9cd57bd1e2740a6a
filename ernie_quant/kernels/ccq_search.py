"""The search of WINT2's scales, compiled: the same steps as in ccq_reference, which has the reasons."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels.ccq_bytes import round_bf16
from ernie_quant.kernels.ccq_choice import choose
from ernie_quant.kernels.ccq_scores import gains, place

F = np.float32
AT_ONCE = 32768  # weights: rows that go through one pair's table while it lies in the processor's second cache


@compiled()
def _load(bits, shift, order, least, most, planes):  # type: ignore[no-untyped-def]
    """A row, as bits of bf16 (shift 16) or f32, into planes f32 [2, in/2] in stored order; zeros if it cannot be encoded."""
    words, peak, one = planes.view(np.uint32), np.uint32(0), np.empty(1, F)
    for g in range(bits.size // 64):
        for half in range(2):
            for j in range(32):
                word = np.uint32(bits[64 * g + order[half, j]]) << shift
                words[half, 32 * g + j] = word
                peak = max(peak, word & np.uint32(0x7FFFFFFF))  # larger numbers have larger bits, and NaN the largest
    one.view(np.uint32)[0] = peak
    if not least <= one[0] <= most:
        planes[:] = 0


@compiled()
def _liked_scales(planes, per_rms, per_peak, energy, liked):  # type: ignore[no-untyped-def]
    """What each group likes, from its energy |w|^2 (-> f64 [groups]) and its largest |w|: -> liked f32 [groups]."""
    for g in range(liked.size):
        total, peak = 0.0, F(0)
        for v in range(16 * g, 16 * g + 16):
            for half in range(2):
                for w in (planes[half, 2 * v], planes[half, 2 * v + 1]):
                    total += np.float64(w) * np.float64(w)
                    peak = max(peak, abs(w))
        energy[g] = total
        liked[g] = max(np.sqrt(total / 64) * per_rms, np.float64(peak) * per_peak)
    round_bf16(liked)


@compiled()
def _super_scale(liked, energy, factors, ideal, loss):  # type: ignore[no-untyped-def]
    """The f32 (rounded to bf16) whose multiples 1 to 15 lie nearest to the liked scales; ideal f32, loss f64 [factors]."""
    loudest = np.float64(0)
    for g in range(liked.size):
        loudest = max(loudest, np.float64(liked[g]))
    for k in range(factors.size):
        ideal[k], loss[k] = loudest * factors[k], 0.0
    round_bf16(ideal)
    for g in range(liked.size):
        like = np.float64(liked[g])
        if like > 0:
            for k in range(factors.size):
                multiple = np.float64(ideal[k])
                miss = min(max(np.rint(like / multiple), 1.0), 15.0) * multiple / like - 1
                loss[k] += energy[g] * min(miss * miss, 1.0)
    return ideal[np.argmin(loss)]  # the first of equals


@compiled()
def _multiply(local, super_scale, scale):  # type: ignore[no-untyped-def]
    """scale f32 [groups] = bf16(local * super_scale), local int64 [groups]."""
    for g in range(local.size):
        scale[g] = F(local[g]) * super_scale
    round_bf16(scale)


@compiled()
def _best_locals(planes, super_scale, start, known, lines, scale, x, cell, local):  # type: ignore[no-untyped-def]
    """Local scales near `start` (gain `known`, which becomes theirs) -> local int64 [groups]."""
    groups = start.size
    trial, gain = np.empty(groups, np.int64), np.empty(groups)
    for g in range(groups):
        known[g] = max(known[g], 0.0)
        local[g] = start[g] if known[g] > 0 else 0
    for step in range(3):
        for g in range(groups):
            near = start[g] - 1 if step == 0 else start[g] + 1
            trial[g] = min(max(2 * local[g] - start[g] if step == 2 else near, 0), 15)
        _multiply(trial, super_scale, scale)
        place(planes, scale, x, cell)
        gains(x, cell, scale, lines, gain)
        for g in range(groups):
            if gain[g] > known[g]:
                known[g], local[g] = gain[g], trial[g]


@compiled()
def search(bits, shift, order, limits, per_rms, per_peak, factors, tables, codes, local_scale, super_scale, pair):  # type: ignore[no-untyped-def]
    """Scales, pair and bytes of every row, given as bits of bf16 (shift 16) or f32 [out, in], into the last four arrays.

    Pair after pair for some rows at a time, so that the table of a pair is read from the cache: order int64 [2, 32] of the
    inputs of a group, tables as ccq_lists makes them.
    """
    lines, listed, clear, values, all_lines, begins = tables
    rows, width = bits.shape
    groups, pairs = width // 64, len(lines)
    block = max(1, min(rows, AT_ONCE // width))
    planes, x = np.empty((block, 2, width // 2), F), np.empty((block, 2, width // 2), np.int16)
    cell = np.empty((block, width // 4), np.int32)
    start, local, scale = np.empty((block, groups), np.int64), np.empty(groups, np.int64), np.empty((block, groups), F)
    energy, liked, gain, known = np.empty(groups), np.empty(groups, F), np.empty(groups), np.empty((block, groups))
    ideal, loss, most = np.empty(factors.size, F), np.empty(factors.size), np.empty(block)
    for first in range(0, rows, block):
        n = min(block, rows - first)
        for r in range(n):
            _load(bits[first + r], shift, order, limits[0], limits[1], planes[r])
            _liked_scales(planes[r], per_rms, per_peak, energy, liked)
            top = _super_scale(liked, energy, factors, ideal, loss)
            for g in range(groups):
                k = np.float64(liked[g]) / np.float64(top) if liked[g] > 0 else 0.0
                start[r, g] = np.int64(min(np.rint(k), 15.0))
            _multiply(start[r], top, scale[r])
            place(planes[r], scale[r], x[r], cell[r])
            super_scale[first + r], most[r] = top, -np.inf
        for p in range(pairs):
            for r in range(n):
                gains(x[r], cell[r], scale[r], lines[p], gain)
                total = 0.0
                for g in range(groups):
                    total += gain[g]
                if total > most[r]:  # the first of equals
                    most[r], pair[first + r] = total, p
                    known[r] = gain
        for r in range(n):
            top, which = super_scale[first + r], pair[first + r]
            _best_locals(planes[r], top, start[r], known[r], lines[which], scale[r], x[r], cell[r], local)
            _multiply(local, top, scale[r])
            place(planes[r], scale[r], x[r], cell[r])
            near = (lines[which], listed[which], clear[which], values[which], all_lines[which], begins[which])
            choose(planes[r], x[r], cell[r], scale[r], *near, codes[first + r])
            for g in range(groups):
                local_scale[first + r, g] = local[g]
