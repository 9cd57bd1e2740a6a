"""The searches behind ggml's block types, for many sub-blocks side by side.

A value is worth step * level(code) - minimum. First steps (and minima) are fitted for each sub-block by itself: for a few
divisors of its range the values are rounded, and weighted least squares say which step (and minimum) suits these codes best;
the least error wins. What is stored of them, _ggml_choose decides.

`weights` are those of the squared errors. Values of a sub-block are divided by the largest, so that no square overflows.
Tiles are flat, float32 [size * LANES], and sums take four values of a sub-block at a time: the compiler knows how far they lie
apart, and each sum is read and written a quarter as often.
"""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

F = np.float32
ROUND = F(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even
LANES = 64  # sub-blocks side by side
SMALLEST = F(1e-30)  # a sub-block of smaller values is zeros: float16 holds no step for it
SINGULAR = F(2.0**-20)  # a determinant below this part of its terms says nothing
UNEVEN = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), F)  # kvalues_iq4nl
# halfway between two of them are whole halves: the one nearest to v is at ceil(2 v) + 256. Constants of the compiled code: an
# array that it is given might be one that it writes to, and would be read one element at a time
AT = np.searchsorted((UNEVEN[1:] + UNEVEN[:-1]) / 2, np.arange(-256, 256) / 2)
NEAREST, NEAREST_CODE = UNEVEN[AT], AT.astype(F)
# fmt: off
# what there is one of for every sub-block of a tile lies in one flat array, float32 [FIELDS * LANES], at these places
TOP, INVERSE_TOP                          = 0 * LANES, 1 * LANES
INVERSE, OFFSET, ONE, SQUARE, PRODUCT     = 2 * LANES, 3 * LANES, 4 * LANES, 5 * LANES, 6 * LANES    # a grid, sums of its codes
STEP, MINIMUM, BEST, CURVATURE            = 7 * LANES, 8 * LANES, 9 * LANES, 10 * LANES              # the best so far
LOW, SPAN, SUM_W, SUM_X, SUM_XX           = 11 * LANES, 12 * LANES, 13 * LANES, 14 * LANES, 15 * LANES
FIELDS                                    = 16
# fmt: on


@compiled()
def _columns(rows, first, n, size, tile):  # type: ignore[no-untyped-def]
    """Rows from `first` on side by side, eight at a time: as many as the processor reads ahead."""
    whole = n // 8 * 8
    for i in range(0, whole, 8):
        for j in range(size):
            for k in range(8):
                tile[j * LANES + i + k] = rows[first + i + k, j]
    for i in range(whole, n):
        for j in range(size):
            tile[j * LANES + i] = rows[first + i, j]


@compiled(error_model="numpy")
def load(values, importance, first, n, size, tile, weights, f):  # type: ignore[no-untyped-def]
    """Sub-blocks [first, first + n) side by side, times 1 / their largest magnitude TOP, and their weights.

    values: float32 [sub-blocks, size]; importance: float32 [sub-blocks of a row, then LANES from the first on again, size], at
    most 1, or empty: then the weights stay.
    """
    if n < LANES:
        tile[:] = F(0)
    _columns(values, first, n, size, tile)
    for i in range(LANES):
        f[i + TOP] = F(0)
    for j in range(size):
        column = tile[j * LANES : (j + 1) * LANES]
        for i in range(LANES):
            x = abs(column[i])
            f[i + TOP] = x if x > f[i + TOP] else f[i + TOP]
    for i in range(LANES):
        top = f[i + TOP]
        top = top if (top >= SMALLEST) & (top < F(np.inf)) else F(0)
        f[i + TOP], f[i + INVERSE_TOP] = top, F(1) / top if top > 0 else F(0)
    for j in range(size):
        column = tile[j * LANES : (j + 1) * LANES]
        for i in range(LANES):
            x = column[i] * f[i + INVERSE_TOP]
            column[i] = x if x == x else F(0)  # no number, or infinity: a block whose scales are numbers all the same
    if len(importance) > 0:
        _columns(importance, first % (len(importance) - LANES), n, size, weights)


@compiled(inline="always")
def at(value):  # type: ignore[no-untyped-def]
    """Where the nearest of the table is in NEAREST."""
    v = min(max(value, F(-127)), F(127))
    return np.uint32(np.int32(np.ceil(v + v)) + np.int32(256)) & np.uint32(511)  # what is no number is somewhere as well


@compiled(inline="always")
def rounded(value, low, high):  # type: ignore[no-untyped-def]
    """To the nearest whole number from low to high."""
    return (min(max(value, low), high) + ROUND) - ROUND


@compiled(error_model="numpy")
def fit_affine(tile, weights, size, most, divisors, shifts, free, f):  # type: ignore[no-untyped-def]
    """Steps and minima for codes 0 to `most`; the minimum is not negative unless it is `free`. The tile loses its lowest values.

    Codes are rounded on grids of `divisors` steps over the range that begin `shifts` steps beside it, and once more on the best.
    """
    for i in range(LANES):
        f[i + LOW] = tile[i] if free else F(0)
        f[i + SPAN] = tile[i]
        f[i + SUM_W] = f[i + SUM_X] = f[i + SUM_XX] = F(0)
    for j in range(size):
        column = tile[j * LANES : (j + 1) * LANES]
        for i in range(LANES):
            f[i + LOW] = min(f[i + LOW], column[i])
            f[i + SPAN] = max(f[i + SPAN], column[i])
    for j in range(size):  # from the lowest on, or a large mean would hide in float32 what the codes are to tell apart
        column, weight = tile[j * LANES : (j + 1) * LANES], weights[j * LANES : (j + 1) * LANES]
        for i in range(LANES):
            x = column[i] - f[i + LOW]
            p = weight[i] * x
            column[i] = x
            f[i + SUM_W] += weight[i]
            f[i + SUM_X] += p
            f[i + SUM_XX] += p * x
    for i in range(LANES):
        f[i + SPAN] -= f[i + LOW]
        f[i + STEP] = f[i + MINIMUM] = F(0)
        f[i + BEST] = F(np.inf)
    for k in range(len(divisors)):
        for t in range(len(shifts)):
            for i in range(LANES):
                f[i + INVERSE] = divisors[k] / f[i + SPAN] if f[i + SPAN] > 0 else F(0)
                f[i + OFFSET] = shifts[t]
            _sums_of(tile, weights, size, most, f)
            _solve(free, most, f)
    for i in range(LANES):
        f[i + INVERSE] = F(1) / f[i + STEP] if f[i + STEP] > 0 else F(0)
        f[i + OFFSET] = f[i + MINIMUM] * f[i + INVERSE]
    _sums_of(tile, weights, size, most, f)
    _solve(free, most, f)
    for i in range(LANES):
        f[i + MINIMUM] -= f[i + LOW]


@compiled(error_model="numpy")
def _sums_of(tile, weights, size, most, f):  # type: ignore[no-untyped-def]
    """Weighted sums of the codes of x * inverse + offset, of their squares, and of their products with x."""
    for i in range(LANES):
        f[i + ONE] = f[i + SQUARE] = f[i + PRODUCT] = F(0)
    for j in range(0, size * LANES, 4 * LANES):
        xs, ws = tile[j : j + 4 * LANES], weights[j : j + 4 * LANES]
        for i in range(LANES):
            one, square, product, inverse, offset = f[i + ONE], f[i + SQUARE], f[i + PRODUCT], f[i + INVERSE], f[i + OFFSET]
            for k in range(4):
                x = xs[i + k * LANES]
                code = rounded(x * inverse + offset, F(0), most)
                p = ws[i + k * LANES] * code
                one += p
                square += p * code
                product += p * x
            f[i + ONE], f[i + SQUARE], f[i + PRODUCT] = one, square, product


@compiled(error_model="numpy")
def _solve(free, most, f):  # type: ignore[no-untyped-def]
    """The least squares of these sums, where they are better than the best so far."""
    for i in range(LANES):
        one, square, product, sum_w, sum_x = f[i + ONE], f[i + SQUARE], f[i + PRODUCT], f[i + SUM_W], f[i + SUM_X]
        d, zero = sum_w * square - one * one, -f[i + LOW]
        both = d > SINGULAR * (sum_w * square)  # else only one code has a weight: the grid stays where it begins
        m = (square * sum_x - one * product) / d if both else -f[i + OFFSET] / f[i + INVERSE]
        above = (not free) & (m > zero)
        m = zero if above else m
        s = (sum_w * product - sum_x * one) / d if both & (not above) else (product - m * one) / square
        error = f[i + SUM_XX] + s * (s * square + F(2) * (m * one - product)) + m * (m * sum_w - F(2) * sum_x)
        better = (s > 0) & (s * most <= F(2) * f[i + SPAN]) & (error < f[i + BEST])
        f[i + STEP] = s if better else f[i + STEP]
        f[i + MINIMUM] = -m if better else f[i + MINIMUM]
        f[i + BEST] = error if better else f[i + BEST]


@compiled(error_model="numpy")
def fit_step(tile, weights, size, edge, divisors, table, f):  # type: ignore[no-untyped-def]
    """Steps, which may be negative, for codes -edge to edge - 1, or for the table; and half the CURVATURE of the error.

    For divisor d the largest magnitude comes to level -d, for a negative one to the other end of the range.
    """
    for i in range(LANES):
        f[i + SPAN] = f[i + STEP] = f[i + CURVATURE] = f[i + BEST] = f[i + MINIMUM] = F(0)
    for j in range(size):
        column = tile[j * LANES : (j + 1) * LANES]
        for i in range(LANES):
            f[i + SPAN] = column[i] if abs(column[i]) > abs(f[i + SPAN]) else f[i + SPAN]
    for d in divisors:
        for i in range(LANES):
            f[i + INVERSE] = -d / f[i + SPAN] if f[i + SPAN] != 0 else F(0)
            f[i + SQUARE] = f[i + PRODUCT] = F(0)
        for j in range(0, size * LANES, 4 * LANES):
            xs, ws = tile[j : j + 4 * LANES], weights[j : j + 4 * LANES]
            if table:
                for i in range(LANES):
                    square, product, inverse = f[i + SQUARE], f[i + PRODUCT], f[i + INVERSE]
                    for k in range(4):
                        x = xs[i + k * LANES]
                        level = NEAREST[at(x * inverse)]
                        p = ws[i + k * LANES] * level
                        square += p * level
                        product += p * x
                    f[i + SQUARE], f[i + PRODUCT] = square, product
            else:
                for i in range(LANES):
                    square, product, inverse = f[i + SQUARE], f[i + PRODUCT], f[i + INVERSE]
                    for k in range(4):
                        x = xs[i + k * LANES]
                        level = rounded(x * inverse, -edge, edge - F(1))
                        p = ws[i + k * LANES] * level
                        square += p * level
                        product += p * x
                    f[i + SQUARE], f[i + PRODUCT] = square, product
        for i in range(LANES):
            square, product = f[i + SQUARE], f[i + PRODUCT]
            gain = product * product / square if square > 0 else F(0)
            better = gain > f[i + BEST]
            f[i + STEP] = product / square if better else f[i + STEP]
            f[i + CURVATURE] = square if better else f[i + CURVATURE]
            f[i + BEST] = gain if better else f[i + BEST]


@compiled(error_model="numpy")
def fit_all(values, importance, size, affine, free, edge, most, divisors, shifts, table, steps, minima, curvatures):  # type: ignore[no-untyped-def]
    """Steps (and minima, if it is `affine`) of all sub-blocks, float32 [sub-blocks, size]."""
    tile, weights, f = np.empty(size * LANES, F), np.ones(size * LANES, F), np.zeros(FIELDS * LANES, F)
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, first, n, size, tile, weights, f)
        if affine:
            fit_affine(tile, weights, size, most, divisors, shifts, free, f)
        else:
            fit_step(tile, weights, size, edge, divisors, table, f)
        for i in range(n):
            top = f[i + TOP]
            steps[first + i], minima[first + i], curvatures[first + i] = f[i + STEP] * top, f[i + MINIMUM] * top, f[i + CURVATURE]
