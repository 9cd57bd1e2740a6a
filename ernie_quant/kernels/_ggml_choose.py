"""What blocks of ggml store of fitted steps and minima, and the codes that are nearest then.

A block's own numbers are rounded first. Then for every sub-block the stored integers next to its step and minimum are tried
by their true error, with the codes that are nearest at each. ggml's encoder (ggml-quants.c) stops at the rounding; on Gaussian
rows that costs 2 to 20 % more error.
"""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._ggml_search import LANES, ROUND, F, in_table, load


@compiled(error_model="numpy")
def error_of(tile, weights, size, step, minimum, edge, most, table, work, error):  # type: ignore[no-untyped-def]
    """Weighted squared errors with the nearest codes 0 to `most`, which are worth step * (code - edge) - minimum."""
    inverse, value, level = work[0], work[1], work[2]
    for i in range(LANES):
        inverse[i] = F(1) / step[i] if step[i] != 0 else F(0)
        error[i] = F(0)
    if len(table) == 0:
        for j in range(size):
            for i in range(LANES):
                x = tile[j, i]
                code = (min(max((x + minimum[i]) * inverse[i], -edge), most - edge) + ROUND) - ROUND
                d = x - (step[i] * code - minimum[i])
                error[i] += weights[j, i] * d * d
    else:
        for j in range(size):
            in_table(tile[j], inverse, table, value, level)
            for i in range(LANES):
                d = tile[j, i] - step[i] * level[i]
                error[i] += weights[j, i] * d * d


@compiled(error_model="numpy")
def choose(values, importance, size, units, edge, most, table, limits, near, whole, errors):  # type: ignore[no-untyped-def]
    """Stored integers of all sub-blocks: the best of those `near` them, which `whole` becomes, and their squared `errors`.

    units: float32 [2, sub-blocks], what 1 of them is worth in steps and in minima. limits: their least and largest values.
    near: float32 [pairs, 2]. whole: float32 [2, sub-blocks].
    """
    tile, weights = np.empty((size, LANES), F), np.empty((size, LANES), F)
    work, top = np.empty((11, LANES), F), np.empty(LANES, F)
    step, minimum, error, best = work[3], work[4], work[5], work[6]
    scale, offset, inverse_top, share = work[7], work[8], work[9], work[10]
    per_row = max(1, len(importance))
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, per_row, first, n, size, tile, weights, top, share)
        for i in range(n):
            best[i], scale[i], offset[i] = F(np.inf), whole[0, first + i], whole[1, first + i]
            inverse_top[i] = F(1) / top[i] if top[i] > 0 else F(0)
        for k in range(len(near)):
            for i in range(n):
                s = min(max(whole[0, first + i] + near[k, 0], limits[0]), limits[1])
                m = min(max(whole[1, first + i] + near[k, 1], limits[2]), limits[3])
                step[i] = units[0, first + i] * s * inverse_top[i]
                minimum[i] = units[1, first + i] * m * inverse_top[i]
            error_of(tile, weights, size, step, minimum, edge, most, table, work, error)
            for i in range(n):
                better = error[i] < best[i]
                best[i] = error[i] if better else best[i]
                scale[i] = min(max(whole[0, first + i] + near[k, 0], limits[0]), limits[1]) if better else scale[i]
                offset[i] = min(max(whole[1, first + i] + near[k, 1], limits[2]), limits[3]) if better else offset[i]
        for i in range(n):
            whole[0, first + i] = scale[i]
            whole[1, first + i] = offset[i]
            errors[first + i] = best[i] * top[i] * top[i] * share[i]


@compiled(error_model="numpy")
def sums_of(values, importance, size, units, edge, most, table, whole, sums):  # type: ignore[no-untyped-def]
    """For least squares of units: weighted sums over each sub-block, float32 [5, sub-blocks], with its nearest levels q.

    Of (s q)^2, s q m, m^2, s q x and m x, where s and m are its stored integers and x ~ unit s q - unit m.
    """
    tile, weights = np.empty((size, LANES), F), np.empty((size, LANES), F)
    work, top = np.empty((11, LANES), F), np.empty(LANES, F)
    inverse, value, level, share = work[0], work[1], work[2], work[10]
    qq, q, one, xq, x_ = work[3], work[4], work[5], work[6], work[7]
    shift = work[8]
    per_row = max(1, len(importance))
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, per_row, first, n, size, tile, weights, top, share)
        for i in range(n):
            s = units[0, first + i] * whole[0, first + i]
            inverse[i] = top[i] / s if s != 0 else F(0)
            shift[i] = units[1, first + i] * whole[1, first + i] / s if s != 0 else F(0)
            qq[i], q[i], one[i], xq[i], x_[i] = F(0), F(0), F(0), F(0), F(0)
        for j in range(size):
            if len(table) == 0:
                for i in range(LANES):
                    level[i] = (min(max(tile[j, i] * inverse[i] + shift[i], -edge), most - edge) + ROUND) - ROUND
            else:
                in_table(tile[j], inverse, table, value, level)
            for i in range(LANES):
                x, w = tile[j, i], weights[j, i]
                qq[i] += w * level[i] * level[i]
                q[i] += w * level[i]
                one[i] += w
                xq[i] += w * x * level[i]
                x_[i] += w * x
        for i in range(n):
            s, m = whole[0, first + i], whole[1, first + i]
            sums[0, first + i] = share[i] * s * s * qq[i]
            sums[1, first + i] = share[i] * s * m * q[i]
            sums[2, first + i] = share[i] * m * m * one[i]
            sums[3, first + i] = share[i] * top[i] * s * xq[i]
            sums[4, first + i] = share[i] * top[i] * m * x_[i]


@compiled(error_model="numpy")
def nearest(values, first, n, size, step, minimum, edge, most, table, codes):  # type: ignore[no-untyped-def]
    """The nearest codes, counted from 0, of sub-blocks as they are."""
    value, code = np.empty(size, F), np.empty(size, np.uint8)
    for i in range(n):
        inverse = F(1) / step[i] if step[i] != 0 else F(0)
        if abs(inverse) == F(np.inf):
            inverse = F(0)
        if len(table) == 0:
            for j in range(size):
                level = (min(max((values[first + i, j] + minimum[i]) * inverse, -edge), most - edge) + ROUND) - ROUND
                codes[first + i, j] = np.uint8(level + edge)
        else:
            for j in range(size):
                value[j] = values[first + i, j] * inverse
                code[j] = np.uint8(0)
            for t in range(len(table) - 1):
                middle = (table[t] + table[t + 1]) * F(0.5)
                for j in range(size):
                    code[j] += np.uint8(value[j] > middle)
            for j in range(size):
                codes[first + i, j] = code[j]


@compiled(error_model="numpy")
def nearest_all(values, size, step, minimum, edge, most, table, codes):  # type: ignore[no-untyped-def]
    """The nearest codes of all sub-blocks, uint8 [sub-blocks, size]."""
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        nearest(values, first, n, size, step[first : first + n], minimum[first : first + n], edge, most, table, codes)


@compiled(error_model="numpy")
def expand(codes, step, minimum, edge, table, out):  # type: ignore[no-untyped-def]
    """float32 [sub-blocks, size] of codes: step * (code - edge) - minimum, or step * table[code]."""
    for b in range(len(codes)):
        s, m = step[b], minimum[b]
        if len(table) == 0:
            for j in range(codes.shape[1]):
                out[b, j] = s * (F(codes[b, j]) - edge) - m
        else:
            for j in range(codes.shape[1]):
                out[b, j] = s * table[codes[b, j]]
