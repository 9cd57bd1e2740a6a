"""The searches behind ggml's block types, for many sub-blocks side by side.

A value is worth step * level(code) - minimum. First steps (and minima) are fitted for each sub-block by itself: for a few
divisors of its range the values are rounded, and weighted least squares say which step (and minimum) suits these codes best;
the least error wins. What is stored of them, _ggml_choose decides.

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
            if not d > 0 or (m > 0 and not free):  # all codes are the same one, or the minimum would be above 0
                m = F(0)
                s = sum_xl[i] / sum_ll[i] if sum_ll[i] > 0 else F(0)
            error = sum_xx[i] - s * sum_xl[i] - m * sum_x[i]
            better = s > 0 and error < best[i]
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
