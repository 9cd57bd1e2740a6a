"""The searches behind ggml's block types, for many sub-blocks side by side.

A value is worth step * level(code) - minimum. First steps (and minima) are fitted for each sub-block by itself: for a few
divisors of its range the values are rounded, and weighted least squares say which step (and minimum) suits these codes best;
the least error wins. Then the block's own numbers are rounded as they are stored, and for every sub-block the stored integers
next to them are tried by their true error with the codes that are nearest then. ggml's encoder (ggml-quants.c) stops at the
rounding; on Gaussian rows that costs 2 to 20 % more error.

`weights` are those of the squared errors. Values of a sub-block are divided by the largest, so that no square overflows.
"""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

F = np.float32
ROUND = F(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even
LANES = 64  # sub-blocks side by side
SMALLEST = F(1e-30)  # a sub-block of smaller values is zeros: float16 holds no step for it


@compiled()
def load(values, importance, per_row, first, n, size, tile, weights, top):  # type: ignore[no-untyped-def]
    """Sub-blocks [first, first + n) as columns, divided by their largest magnitude `top`, and their weights.

    values: float32 [sub-blocks, size]; importance: float32 [per_row, size], or empty.
    """
    for i in range(n):
        largest = F(0)
        for j in range(size):
            x = values[first + i, j]
            tile[j, i] = x
            largest = max(largest, abs(x))
        top[i] = largest if largest >= SMALLEST and largest < F(np.inf) else F(0)
        scale = F(1) / top[i] if top[i] > 0 else F(0)
        for j in range(size):
            tile[j, i] *= scale
    if len(importance) == 0:
        weights[:, :] = F(1)
        return
    for i in range(n):
        row = (first + i) % per_row
        largest = F(0)
        for j in range(size):
            largest = max(largest, importance[row, j])
        good = largest > 0 and largest < F(np.inf)
        for j in range(size):
            weights[j, i] = importance[row, j] / largest if good else F(1)


@compiled()
def fit_affine(tile, weights, size, n, most, divisors, free, work, step, minimum):  # type: ignore[no-untyped-def]
    """Steps and minima for codes 0 to `most`; the minimum is not negative unless it is `free`."""
    low, high, best, sum_w, sum_x, sum_xx, inverse = work[0], work[1], work[2], work[3], work[4], work[5], work[6]
    sum_l, sum_ll, sum_xl = work[7], work[8], work[9]
    for i in range(n):
        low[i] = tile[0, i] if free else F(0)
        high[i] = tile[0, i]
        sum_w[i], sum_x[i], sum_xx[i] = F(0), F(0), F(0)
    for j in range(size):
        for i in range(n):
            x, w = tile[j, i], weights[j, i]
            low[i] = min(low[i], x)
            high[i] = max(high[i], x)
            sum_w[i] += w
            sum_x[i] += w * x
            sum_xx[i] += w * x * x
    for i in range(n):
        step[i], minimum[i], best[i] = F(0), -low[i], F(np.inf)
    for k in range(len(divisors)):
        for i in range(n):
            span = high[i] + minimum[i]
            inverse[i] = divisors[k] / span if span > 0 else F(0)
            sum_l[i], sum_ll[i], sum_xl[i] = F(0), F(0), F(0)
        for j in range(size):
            for i in range(n):
                x, w = tile[j, i], weights[j, i]
                code = (min(max((x + minimum[i]) * inverse[i], F(0)), most) + ROUND) - ROUND
                sum_l[i] += w * code
                sum_ll[i] += w * code * code
                sum_xl[i] += w * x * code
        for i in range(n):
            d = sum_w[i] * sum_ll[i] - sum_l[i] * sum_l[i]
            s = (sum_w[i] * sum_xl[i] - sum_x[i] * sum_l[i]) / d if d > 0 else F(0)
            m = (sum_ll[i] * sum_x[i] - sum_l[i] * sum_xl[i]) / d if d > 0 else F(0)
            if m > 0 and not free:
                m = F(0)
                s = sum_xl[i] / sum_ll[i] if sum_ll[i] > 0 else F(0)
            error = sum_xx[i] - s * sum_xl[i] - m * sum_x[i]
            better = d > 0 and s > 0 and error < best[i]
            step[i] = s if better else step[i]
            minimum[i] = -m if better else minimum[i]
            best[i] = error if better else best[i]


@compiled()
def in_table(column, inverse, n, table, value, level):  # type: ignore[no-untyped-def]
    """The values of the table nearest to column * inverse."""
    for i in range(n):
        value[i] = column[i] * inverse[i]
        level[i] = table[0]
    for t in range(len(table) - 1):
        middle, above = (table[t] + table[t + 1]) * F(0.5), table[t + 1]
        for i in range(n):
            level[i] = above if value[i] > middle else level[i]


@compiled()
def fit_step(tile, weights, size, n, edge, divisors, table, work, step):  # type: ignore[no-untyped-def]
    """Steps, which may be negative, for codes -edge to edge - 1, or the values of a `table` whose first is -edge."""
    extreme, best, inverse, sum_ll, sum_xl, value, level = work[0], work[1], work[2], work[3], work[4], work[5], work[6]
    for i in range(n):
        extreme[i] = F(0)
    for j in range(size):
        for i in range(n):
            x = tile[j, i]
            extreme[i] = x if abs(x) > abs(extreme[i]) else extreme[i]
    for i in range(n):
        step[i], best[i] = F(0), F(0)
    for k in range(len(divisors)):
        for i in range(n):
            inverse[i] = -divisors[k] / extreme[i] if extreme[i] != 0 else F(0)
            sum_ll[i], sum_xl[i] = F(0), F(0)
        if len(table) == 0:
            for j in range(size):
                for i in range(n):
                    x, w = tile[j, i], weights[j, i]
                    code = (min(max(x * inverse[i], -edge), edge - F(1)) + ROUND) - ROUND
                    sum_ll[i] += w * code * code
                    sum_xl[i] += w * x * code
        else:
            for j in range(size):
                in_table(tile[j], inverse, n, table, value, level)
                for i in range(n):
                    x, w = tile[j, i], weights[j, i]
                    sum_ll[i] += w * level[i] * level[i]
                    sum_xl[i] += w * x * level[i]
        for i in range(n):
            gain = sum_xl[i] * sum_xl[i] / sum_ll[i] if sum_ll[i] > 0 else F(0)
            better = gain > best[i]
            step[i] = sum_xl[i] / sum_ll[i] if better else step[i]
            best[i] = gain if better else best[i]


@compiled()
def error_of(tile, weights, size, n, step, minimum, edge, most, table, work, error):  # type: ignore[no-untyped-def]
    """Weighted squared errors with the nearest codes 0 to `most`, which are worth step * (code - edge) - minimum."""
    inverse, value, level = work[0], work[1], work[2]
    for i in range(n):
        inverse[i] = F(1) / step[i] if step[i] != 0 else F(0)
        error[i] = F(0)
    if len(table) == 0:
        for j in range(size):
            for i in range(n):
                x = tile[j, i]
                code = (min(max((x + minimum[i]) * inverse[i], -edge), most - edge) + ROUND) - ROUND
                d = x - (step[i] * code - minimum[i])
                error[i] += weights[j, i] * d * d
    else:
        for j in range(size):
            in_table(tile[j], inverse, n, table, value, level)
            for i in range(n):
                d = tile[j, i] - step[i] * level[i]
                error[i] += weights[j, i] * d * d


@compiled()
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


@compiled()
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


@compiled()
def fit_all(values, importance, size, affine, free, edge, most, divisors, table, steps, minima):  # type: ignore[no-untyped-def]
    """Steps (and minima, if it is `affine`) of all sub-blocks, float32 [sub-blocks, size]."""
    tile, weights = np.empty((size, LANES), F), np.empty((size, LANES), F)
    work, top = np.empty((10, LANES), F), np.empty(LANES, F)
    per_row = max(1, len(importance))
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, per_row, first, n, size, tile, weights, top)
        step, minimum = steps[first : first + n], minima[first : first + n]
        if affine:
            fit_affine(tile, weights, size, n, most, divisors, free, work, step, minimum)
        else:
            fit_step(tile, weights, size, n, edge, divisors, table, work, step)
            minimum[:] = F(0)
        for i in range(n):
            step[i] *= top[i]
            minimum[i] *= top[i]


@compiled()
def choose(values, importance, size, units, edge, most, table, limits, radius, whole):  # type: ignore[no-untyped-def]
    """Stored integers of all sub-blocks: the best of those next to `whole`, which is overwritten.

    units: float32 [2, sub-blocks], what 1 of them is worth in steps and in minima. limits: their least and largest values.
    whole: float32 [2, sub-blocks].
    """
    tile, weights = np.empty((size, LANES), F), np.empty((size, LANES), F)
    work, top = np.empty((10, LANES), F), np.empty(LANES, F)
    step, minimum, error, best = work[3], work[4], work[5], work[6]
    scale, offset, inverse_top = work[7], work[8], work[9]
    per_row = max(1, len(importance))
    around = radius if limits[3] > 0 else 0
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, per_row, first, n, size, tile, weights, top)
        for i in range(n):
            best[i], scale[i], offset[i] = F(np.inf), whole[0, first + i], whole[1, first + i]
            inverse_top[i] = F(1) / top[i] if top[i] > 0 else F(0)
        for a in range(-radius, radius + 1):
            for b in range(-around, around + 1):
                for i in range(n):
                    s = min(max(whole[0, first + i] + F(a), limits[0]), limits[1])
                    m = min(max(whole[1, first + i] + F(b), limits[2]), limits[3])
                    step[i] = units[0, first + i] * s * inverse_top[i]
                    minimum[i] = units[1, first + i] * m * inverse_top[i]
                error_of(tile, weights, size, n, step, minimum, edge, most, table, work, error)
                for i in range(n):
                    better = error[i] < best[i]
                    best[i] = error[i] if better else best[i]
                    scale[i] = min(max(whole[0, first + i] + F(a), limits[0]), limits[1]) if better else scale[i]
                    offset[i] = min(max(whole[1, first + i] + F(b), limits[2]), limits[3]) if better else offset[i]
        for i in range(n):
            whole[0, first + i] = scale[i]
            whole[1, first + i] = offset[i]


@compiled()
def nearest_all(values, size, step, minimum, edge, most, table, codes):  # type: ignore[no-untyped-def]
    """The nearest codes of all sub-blocks, uint8 [sub-blocks, size]."""
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        nearest(values, first, n, size, step[first : first + n], minimum[first : first + n], edge, most, table, codes)
