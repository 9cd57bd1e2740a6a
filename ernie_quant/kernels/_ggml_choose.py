"""What blocks of ggml store of fitted steps and minima, and the codes that are nearest then.

A block's own numbers are rounded first. Then for every sub-block the stored integers next to its step and minimum are tried
by their true error, with the codes that are nearest at each. ggml's encoder (ggml-quants.c) stops at the rounding; on Gaussian
rows that costs 2 to 20 % more error.
"""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels import _ggml_search as search
from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._ggml_search import FIELDS, LANES, NEAREST, NEAREST_CODE, UNEVEN, F, at, load, rounded

# fmt: off
# places as in _ggml_search; START is what is tried around
TOP, INVERSE_TOP, INVERSE, STEP, MINIMUM   = search.TOP, search.INVERSE_TOP, search.INVERSE, search.STEP, search.MINIMUM
ERROR, BEST                                = search.ONE, search.BEST
START, START_MINIMA, UNIT, UNIT_MINIMUM    = search.LOW, search.SPAN, search.SUM_W, search.SUM_X
STEPS, MINIMA, KEPT, KEPT_MINIMA           = search.SUM_XX, search.SQUARE, search.PRODUCT, search.CURVATURE
# fmt: on


@compiled(error_model="numpy")
def unit_of(step, curvature, least, largest, units):  # type: ignore[no-untyped-def]
    """What 1 is worth, float64 [blocks], if integers from least < 0 to largest stand for the steps, float32 [blocks, sub-blocks].

    First the steps furthest from zero on both sides are in reach; then least squares of all steps for the integers of that.
    curvature: how much the square of a step's error counts.
    """
    for b in range(len(step)):
        far, low, high = F(0), F(0), F(0)
        for k in range(step.shape[1]):
            s = step[b, k]
            far = s if abs(s) > abs(far) else far
            low, high = min(low, s), max(high, s)
        unit = max(high / -least, -low / largest) if far > 0 else max(-low / -least, high / largest)
        unit = -unit if far > 0 else unit  # the furthest goes to the end that is further
        square, product = 0.0, 0.0
        for k in range(step.shape[1]):
            whole = rounded(step[b, k] / unit if unit != 0 else F(0), least, largest)
            square += np.float64(curvature[b, k]) * whole * whole
            product += np.float64(curvature[b, k]) * whole * step[b, k]
        units[b] = product / square if square > 0 else np.float64(unit)


@compiled(error_model="numpy")
def error_of(tile, weights, size, edge, most, table, f):  # type: ignore[no-untyped-def]
    """Weighted squared errors with the nearest codes 0 to `most`, which are worth step * (code - edge) - minimum."""
    for i in range(LANES):
        f[i + INVERSE] = F(1) / f[i + STEP] if f[i + STEP] != 0 else F(0)
        f[i + ERROR] = F(0)
    for j in range(0, size * LANES, 4 * LANES):
        xs, ws = tile[j : j + 4 * LANES], weights[j : j + 4 * LANES]
        if table:
            for i in range(LANES):
                error, step, inverse = f[i + ERROR], f[i + STEP], f[i + INVERSE]
                for k in range(4):
                    x = xs[i + k * LANES]
                    d = x - step * NEAREST[at(x * inverse)]
                    error += ws[i + k * LANES] * d * d
                f[i + ERROR] = error
        else:
            for i in range(LANES):
                error, step, inverse, minimum = f[i + ERROR], f[i + STEP], f[i + INVERSE], f[i + MINIMUM]
                for k in range(4):
                    x = xs[i + k * LANES]
                    d = x - (step * rounded((x + minimum) * inverse, -edge, most - edge) - minimum)
                    error += ws[i + k * LANES] * d * d
                f[i + ERROR] = error


@compiled(error_model="numpy")
def choose(values, importance, size, units, edge, most, table, limits, near, fitted, whole, errors):  # type: ignore[no-untyped-def]
    """Integers of all sub-blocks: the best of those `near` the ones that are nearest to what was fitted, and squared errors.

    units: float32 [2, blocks], what 1 is worth in steps and in minima. limits: their least and largest. near: float32 [pairs, 2].
    fitted: float32 [2, sub-blocks]; whole: the same shape, what is found; errors: float32 [sub-blocks].
    """
    tile, weights, f = np.empty(size * LANES, F), np.ones(size * LANES, F), np.zeros(FIELDS * LANES, F)
    low, high, low_minimum, high_minimum = limits[0], limits[1], limits[2], limits[3]
    per_block = len(values) // max(1, units.shape[1])
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, first, n, size, tile, weights, f)
        for i in range(n):
            block = (first + i) // per_block
            unit, lower = units[0, block], units[1, block]
            f[i + UNIT], f[i + UNIT_MINIMUM] = unit, lower
            f[i + START] = rounded(fitted[0, first + i] / unit if unit != 0 else F(0), low, high)
            f[i + START_MINIMA] = rounded(fitted[1, first + i] / lower if lower != 0 else F(0), low_minimum, high_minimum)
        for i in range(LANES):
            f[i + BEST], f[i + KEPT], f[i + KEPT_MINIMA] = F(np.inf), f[i + START], f[i + START_MINIMA]
        for k in range(len(near)):
            more, more_minima = near[k, 0], near[k, 1]
            for i in range(LANES):
                s, m = f[i + START] + more, f[i + START_MINIMA] + more_minima
                s = min(max(s, low), high)
                m = min(max(m, low_minimum), high_minimum)
                f[i + STEPS], f[i + MINIMA] = s, m
                f[i + STEP] = f[i + UNIT] * s * f[i + INVERSE_TOP]
                f[i + MINIMUM] = f[i + UNIT_MINIMUM] * m * f[i + INVERSE_TOP]
            error_of(tile, weights, size, edge, most, table, f)
            for i in range(LANES):
                better = f[i + ERROR] < f[i + BEST]
                f[i + BEST] = f[i + ERROR] if better else f[i + BEST]
                f[i + KEPT] = f[i + STEPS] if better else f[i + KEPT]
                f[i + KEPT_MINIMA] = f[i + MINIMA] if better else f[i + KEPT_MINIMA]
        for i in range(n):
            whole[0, first + i], whole[1, first + i] = f[i + KEPT], f[i + KEPT_MINIMA]
            errors[first + i] = f[i + BEST] * f[i + TOP] * f[i + TOP]


@compiled(error_model="numpy")
def sums_of(values, importance, size, units, edge, most, whole, sums):  # type: ignore[no-untyped-def]
    """For least squares of units: weighted sums over each sub-block, float32 [5, sub-blocks], with its nearest levels q.

    Of (s q)^2, s q m, m^2, s q x and m x, where s and m are its stored integers and x ~ unit s q - unit m.
    """
    tile, weights, f = np.empty(size * LANES, F), np.ones(size * LANES, F), np.zeros(FIELDS * LANES, F)
    per_block = len(values) // max(1, units.shape[1])
    inverse, shift, total = np.zeros(LANES, F), np.zeros(LANES, F), np.zeros((5, LANES), F)
    qq, q, one, xq, x_ = total[0], total[1], total[2], total[3], total[4]
    for first in range(0, len(values), LANES):
        n = min(LANES, len(values) - first)
        load(values, importance, first, n, size, tile, weights, f)
        for i in range(n):
            block = (first + i) // per_block
            s = units[0, block] * whole[0, first + i]
            inverse[i] = f[i + TOP] / s if s != 0 else F(0)
            shift[i] = units[1, block] * whole[1, first + i] / s if s != 0 else F(0)
        total[:] = F(0)
        for j in range(size):
            xs, ws = tile[j * LANES : (j + 1) * LANES], weights[j * LANES : (j + 1) * LANES]
            for i in range(LANES):
                level = rounded(xs[i] * inverse[i] + shift[i], -edge, most - edge)
                p = ws[i] * level
                qq[i] += p * level
                q[i] += p
                one[i] += ws[i]
                xq[i] += p * xs[i]
                x_[i] += ws[i] * xs[i]
        for i in range(n):
            s, m, top = whole[0, first + i], whole[1, first + i], f[i + TOP]
            sums[0, first + i], sums[1, first + i], sums[2, first + i] = s * s * qq[i], s * m * q[i], m * m * one[i]
            sums[3, first + i], sums[4, first + i] = top * s * xq[i], top * m * x_[i]


@compiled(error_model="numpy")
def nearest_all(values, size, units, whole, edge, most, table, codes):  # type: ignore[no-untyped-def]
    """The nearest codes of all sub-blocks, uint8 [sub-blocks, size], counted from 0."""
    level = np.empty(size, F)
    per_block = len(values) // max(1, units.shape[1])
    for b in range(len(values)):
        step, minimum = units[0, b // per_block] * whole[0, b], units[1, b // per_block] * whole[1, b]
        inverse = F(1) / step if step != 0 else F(0)
        inverse = inverse if abs(inverse) < F(np.inf) else F(0)
        if table:
            for j in range(size):
                level[j] = NEAREST_CODE[at(values[b, j] * inverse)]
        else:
            for j in range(size):
                level[j] = rounded((values[b, j] + minimum) * inverse, -edge, most - edge) + edge
        for j in range(size):
            codes[b, j] = np.uint8(np.int32(level[j]))


@compiled(error_model="numpy")
def expand(codes, step, minimum, edge, table, out):  # type: ignore[no-untyped-def]
    """float32 [sub-blocks, size] of codes: step * (code - edge) - minimum, or step * UNEVEN[code]."""
    for b in range(len(codes)):
        s, m = step[b], minimum[b]
        if table:
            for j in range(codes.shape[1]):
                out[b, j] = s * UNEVEN[codes[b, j]]
        else:
            for j in range(codes.shape[1]):
                out[b, j] = s * (F(codes[b, j]) - edge) - m
