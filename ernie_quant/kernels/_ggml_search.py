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


@compiled(error_model="numpy")
def load(values, importance, per_row, first, n, size, tile, weights, top, share):  # type: ignore[no-untyped-def]
    """Sub-blocks [first, first + n) as columns, divided by their largest magnitude `top`, and weights divided by `share`.

    values: float32 [sub-blocks, size]; importance: float32 [per_row, size], or empty.
    """
    if n < LANES:
        tile[:, n:] = F(0)
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
        share[i] = F(1)
    if len(importance) == 0:
        weights[:, :] = F(1)
        return
    for i in range(n):
        row = (first + i) % per_row
        largest = F(0)
        for j in range(size):
            largest = max(largest, importance[row, j])
        good = largest > 0 and largest < F(np.inf)
        share[i] = largest if good else F(0)
        for j in range(size):
            weights[j, i] = importance[row, j] / largest if good else F(1)


@compiled(error_model="numpy")
def fit_affine(tile, weights, size, most, divisors, shifts, free, work, step, minimum):  # type: ignore[no-untyped-def]
    """Steps and minima for codes 0 to `most`; the minimum is not negative unless it is `free`.

    Codes are rounded on grids of `divisors` steps over the range that begin `shifts` steps beside it, and once more on the best.
    """
    low, span, best, sum_w, sum_x, sum_xx = work[0], work[1], work[2], work[3], work[4], work[5]
    inverse, offset = work[6], work[7]
    sums = work[8:11]
    for i in range(LANES):
        low[i] = tile[0, i] if free else F(0)
        span[i] = tile[0, i]
        sum_w[i], sum_x[i], sum_xx[i] = F(0), F(0), F(0)
    for j in range(size):
        for i in range(LANES):
            x, w = tile[j, i], weights[j, i]
            low[i] = min(low[i], x)
            span[i] = max(span[i], x)
            sum_w[i] += w
            sum_x[i] += w * x
            sum_xx[i] += w * x * x
    for i in range(LANES):
        span[i] -= low[i]
        step[i], minimum[i], best[i] = F(0), -low[i], F(np.inf)
    for k in range(len(divisors)):
        for t in range(len(shifts)):
            for i in range(LANES):
                inverse[i] = divisors[k] / span[i] if span[i] > 0 else F(0)
                offset[i] = shifts[t] - low[i] * inverse[i]
            _sums_of(tile, weights, size, most, inverse, offset, sums)
            _solve(free, sums, sum_w, sum_x, sum_xx, best, step, minimum)
    for i in range(LANES):
        inverse[i] = F(1) / step[i] if step[i] > 0 else F(0)
        offset[i] = minimum[i] * inverse[i]
    _sums_of(tile, weights, size, most, inverse, offset, sums)
    _solve(free, sums, sum_w, sum_x, sum_xx, best, step, minimum)


@compiled(error_model="numpy")
def _sums_of(tile, weights, size, most, inverse, offset, sums):  # type: ignore[no-untyped-def]
    """Weighted sums of the codes of x * inverse + offset, of their squares, and of their products with x."""
    one, square, product = sums[0], sums[1], sums[2]
    for i in range(LANES):
        one[i], square[i], product[i] = F(0), F(0), F(0)
    for j in range(size):
        for i in range(LANES):
            x, w = tile[j, i], weights[j, i]
            code = (min(max(x * inverse[i] + offset[i], F(0)), most) + ROUND) - ROUND
            one[i] += w * code
            square[i] += w * code * code
            product[i] += w * x * code


@compiled(error_model="numpy")
def _solve(free, sums, sum_w, sum_x, sum_xx, best, step, minimum):  # type: ignore[no-untyped-def]
    """The least squares of these sums, where they are better than the best so far."""
    one, square, product = sums[0], sums[1], sums[2]
    for i in range(LANES):
        d = sum_w[i] * square[i] - one[i] * one[i]
        s = (sum_w[i] * product[i] - sum_x[i] * one[i]) / d if d > 0 else F(0)
        m = (square[i] * sum_x[i] - one[i] * product[i]) / d if d > 0 else F(0)
        alone = not d > 0 or (m > 0 and not free)  # all codes are the same one, or the minimum would be above 0
        m = F(0) if alone else m
        s = (product[i] / square[i] if square[i] > 0 else F(0)) if alone else s
        error = sum_xx[i] - s * product[i] - m * sum_x[i]
        better = s > 0 and error < best[i]
        step[i] = s if better else step[i]
        minimum[i] = -m if better else minimum[i]
        best[i] = error if better else best[i]


@compiled(error_model="numpy")
def in_table(column, inverse, table, value, level):  # type: ignore[no-untyped-def]
    """The values of the table nearest to column * inverse."""
    for i in range(LANES):
        value[i] = column[i] * inverse[i]
        level[i] = table[0]
    for t in range(len(table) - 1):
        middle, above = (table[t] + table[t + 1]) * F(0.5), table[t + 1]
        for i in range(LANES):
            level[i] = above if value[i] > middle else level[i]


@compiled(error_model="numpy")
def fit_step(tile, weights, size, edge, divisors, table, work, step):  # type: ignore[no-untyped-def]
    """Steps, which may be negative, for codes -edge to edge - 1, or the values of a `table` whose first is -edge."""
    extreme, best, inverse, sum_ll, sum_xl, value, level = work[0], work[1], work[2], work[3], work[4], work[5], work[6]
    for i in range(LANES):
        extreme[i] = F(0)
    for j in range(size):
        for i in range(LANES):
            x = tile[j, i]
            extreme[i] = x if abs(x) > abs(extreme[i]) else extreme[i]
    for i in range(LANES):
        step[i], best[i] = F(0), F(0)
    for k in range(len(divisors)):
        for i in range(LANES):
            inverse[i] = -divisors[k] / extreme[i] if extreme[i] != 0 else F(0)
            sum_ll[i], sum_xl[i] = F(0), F(0)
        if len(table) == 0:
            for j in range(size):
                for i in range(LANES):
                    x, w = tile[j, i], weights[j, i]
                    code = (min(max(x * inverse[i], -edge), edge - F(1)) + ROUND) - ROUND
                    sum_ll[i] += w * code * code
                    sum_xl[i] += w * x * code
        else:
            for j in range(size):
                in_table(tile[j], inverse, table, value, level)
                for i in range(LANES):
                    x, w = tile[j, i], weights[j, i]
                    sum_ll[i] += w * level[i] * level[i]
                    sum_xl[i] += w * x * level[i]
        for i in range(LANES):
            gain = sum_xl[i] * sum_xl[i] / sum_ll[i] if sum_ll[i] > 0 else F(0)
            better = gain > best[i]
            step[i] = sum_xl[i] / sum_ll[i] if better else step[i]
            best[i] = gain if better else best[i]


@compiled(error_model="numpy")
def fit_all(values, importance, size, affine, free, edge, most, divisors, shifts, table, steps, minima):  # type: ignore[no-untyped-def]
    """Steps (and minima, if it is `affine`) of all sub-blocks, float32 [sub-blocks, size]."""
    tile, weights = np.empty((size, LANES), F), np.empty((size, LANES), F)
    work, top = np.empty((11, LANES), F), np.empty(LANES, F)
    step, minimum = np.empty(LANES, F), np.empty(LANES, F)
    per_row = max(1, len(importance))
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, per_row, first, n, size, tile, weights, top, work[10])
        if affine:
            fit_affine(tile, weights, size, most, divisors, shifts, free, work, step, minimum)
        else:
            fit_step(tile, weights, size, edge, divisors, table, work, step)
            minimum[:] = F(0)
        for i in range(n):
            steps[first + i], minima[first + i] = step[i] * top[i], minimum[i] * top[i]
