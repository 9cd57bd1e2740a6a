"""WINT2's bytes at given scales, chosen from scores: the nearest of 256, as `ccq_bytes` finds them by trying all.

Scores are those of the lattice before it is rounded to bf16, on a grid of 1/512. Rounding moves a decoded vector by at most
|p| / 512 < .125 and the grid by less than .002, so that only bytes can be nearest that are within .254 of the best one by
score. They are compared in float64.
"""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._registers import bf16_of
from ernie_quant.kernels.ccq_scores import best_of_line, near_best

F = np.float32
BLUR = 0.254  # in units of the scale
CLIPPED = 32767  # in units of 1/512: `place` does not say how far away these are
EVERY = np.arange(256, dtype=np.uint8)


@compiled()
def choose(planes, x, cell, scale, lines, listed, clear, values, all_lines, begins, codes):  # type: ignore[no-untyped-def]
    """The bytes of a row that was placed at `scale`, 0 where that is -> codes uint8 [in/4]; the tables are of ccq_lists."""
    x01, x23 = x[0].view(np.int32), x[1].view(np.int32)
    for g in range(scale.size):
        if scale[g] == 0:  # all bytes decode alike
            codes[16 * g : 16 * g + 16] = 0
            continue
        for v in range(16 * g, 16 * g + 16):
            energy, peak = np.int64(0), np.int64(0)
            for half in range(2):
                for j in range(2 * v, 2 * v + 2):
                    energy += np.int64(x[half, j]) * np.int64(x[half, j])
                    peak = max(peak, abs(np.int64(x[half, j])))
            score, at = best_of_line(lines, cell[v], x01[v], x23[v])
            reach = np.sqrt(np.float64(energy - 1024 * np.int64(score))) / 512 + BLUR
            if peak < CLIPPED and 4 * reach * reach < clear[cell[v]]:
                near = near_best(lines, cell[v], x01[v], x23[v], score - _blurred(reach))
                if near & (near - 1) == 0:  # one bit
                    codes[v] = listed[8 * cell[v] + at]
                else:
                    codes[v] = _nearest(planes, v, scale[g], values, listed[8 * cell[v] : 8 * cell[v] + 8], near)
            elif peak < CLIPPED:
                x0 = np.float64(x[0, 2 * v]) / 512
                lowest = begins[min(max(np.int64(np.ceil(x0 - reach)) + 32, 0), 64)]
                highest = begins[min(max(np.int64(np.floor(x0 + reach)) + 33, 0), 64)]
                best = (score, reach)
                codes[v] = _nearest_in_range(planes, v, scale[g], values, all_lines, x01[v], x23[v], best, lowest, highest)
            else:
                codes[v] = _nearest(planes, v, scale[g], values, EVERY, -1)


@compiled(inline="always")
def _blurred(reach):  # type: ignore[no-untyped-def]
    """How far a score, times 512, may lie below the best, where (D + .254)^2 - D^2 is twice the difference of scores."""
    return np.int32(512 * BLUR * reach) + np.int32(1)


@compiled(inline="always")
def _distance(planes, v, scale, values, byte):  # type: ignore[no-untyped-def]
    """|w - decoded|^2 in float64, summed as `ccq_bytes` does."""
    total = 0.0
    for i in range(4):
        miss = np.float64(planes[i // 2, 2 * v + i % 2]) - np.float64(bf16_of(F(values[byte, i]) * scale))
        total += miss * miss
    return total


@compiled()
def _nearest(planes, v, scale, values, bytes_, near):  # type: ignore[no-untyped-def]
    """Of bytes in order, the nearest, the first of two; where they are 8, of those whose bit in `near` is set."""
    least, nearest = np.inf, np.uint8(0)
    for k in range(bytes_.size):
        if near < 0 or near >> k & 1:
            distance = _distance(planes, v, scale, values, bytes_[k])
            if distance < least:
                least, nearest = distance, bytes_[k]
    return nearest


@compiled()
def _nearest_in_range(planes, v, scale, values, all_lines, x01, x23, best, lowest, highest):  # type: ignore[no-untyped-def]
    """Of the bytes whose first value is near enough, those that may be nearest by their score; best: a score and its reach."""
    score, reach = best
    first, last, least_score = lowest // 8, (highest + 7) // 8, score - _blurred(reach)
    lines, byte, alone = 0, np.uint8(0), True
    for line in range(first, last):
        near = near_best(all_lines, np.int32(line), x01, x23, least_score)
        if near:
            alone, lines = lines == 0 and near & (near - 1) == 0, lines + 1
            byte = np.uint8(8 * line + best_of_line(all_lines, np.int32(line), x01, x23)[1])
    if alone:  # the best by its score, and nothing near it
        return byte
    least, nearest = np.inf, np.uint8(0)
    for line in range(first, last):
        near = near_best(all_lines, np.int32(line), x01, x23, least_score)
        if near:
            byte = _nearest(planes, v, scale, values, EVERY[8 * line : 8 * line + 8], near)
            distance = _distance(planes, v, scale, values, byte)
            if distance < least:
                least, nearest = distance, byte
    return nearest
