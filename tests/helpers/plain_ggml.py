"""The searches of ggml's block types once more, a sub-block at a time in numpy: what the compiled loops are held to.

All operations are float32, in the order of the loops.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels._ggml import Kind, Scales
from ernie_quant.kernels._ggml_search import SINGULAR, UNEVEN

F = np.float32
Array = np.ndarray[Any, Any]


def encode(dtype: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """The bytes of the kernels, with every loop of theirs in plain words."""
    module = importlib.import_module(f"ernie_quant.kernels.ggml_{dtype.lower()}")
    if dtype == "Q8_0":
        return _q8_0(module, weight)
    kind: Kind = module.KIND
    values = weight.float().numpy().reshape(-1, kind.size)
    per_row = weight.shape[1] // kind.size
    weights = np.ones((per_row, kind.size), F) if importance is None else importance.numpy().reshape(per_row, kind.size)
    with np.errstate(all="ignore"):
        divisors = kind.tried(importance is not None)
        fits = [_fit(kind, x, weights[i % per_row], divisors) for i, x in enumerate(values)]
        step, minimum, curvature = (np.array([fit[k] for fit in fits], F).reshape(-1, kind.per_block) for k in range(3))
        curvature = curvature if importance is None else curvature * np.resize(_shares(weights), curvature.shape)
        scales = _stored(kind, values, weights, step, minimum, curvature)
        codes = [_codes(kind, x, s, m) for x, s, m in zip(values, *scales.of_sub_blocks(), strict=True)]
    original = module.ggml.encode
    module.ggml = _Replaced(scales, np.array(codes, np.uint8).reshape(-1, kind.size * kind.per_block))
    try:
        result: torch.Tensor = module.encode(weight, importance)
    finally:
        module.ggml = ggml
    assert module.ggml.encode is original
    return result


class _Replaced:
    """The shared functions, with what was searched here."""

    def __init__(self, scales: Scales, codes: Array) -> None:
        self.found = scales, codes

    def encode(self, *_: object) -> tuple[Scales, Array]:
        return self.found

    def __getattr__(self, name: str) -> Any:
        return getattr(ggml, name)


def _q8_0(module: ModuleType, weight: torch.Tensor) -> torch.Tensor:
    scale = (weight.float().reshape(len(weight), -1, 32).abs().amax(2) / 127).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0).repeat_interleave(32, 1)
    return module.pack((weight.float() * inverse).clamp(-127, 127).round().to(torch.int8), scale)  # type: ignore[no-any-return]


def _normal(x: Array, importance: Array) -> tuple[Array, Array, Any]:
    top = np.abs(x).max()
    top = top if 1e-30 <= top < np.inf else F(0)
    largest = importance.max()
    weights = importance / largest if 0 < largest < np.inf else np.ones_like(importance)
    return x * (F(1) / top if top > 0 else F(0)), weights, top


def _shares(weights: Array) -> Array:
    """What the errors of the sub-blocks of a row count in their blocks, at most 1."""
    largest = weights.max(1)
    shares = np.where((largest > 0) & (largest < np.inf), largest, F(0))
    return shares / shares.max() if shares.any() else shares


def _sum(values: Array) -> Any:
    total = F(0)
    for value in values:  # from the first to the last, as the loops do
        total = F(total + value)
    return total


def _levels(kind: Kind, scaled: Array, low: float, high: float) -> Array:
    if kind.table:
        middle = (UNEVEN[1:] + UNEVEN[:-1]) * F(0.5)
        return UNEVEN[(scaled[:, None] > middle).sum(1)]
    return np.rint(np.clip(scaled, F(low), F(high))).astype(F)


def _fit(kind: Kind, x: Array, importance: Array, divisors: Array) -> tuple[Any, Any, Any]:
    x, w, top = _normal(x, importance)
    step, minimum, curvature = (_affine if kind.affine else _symmetric)(kind, x, w, divisors)
    return F(step * top), F(minimum * top), curvature


def _symmetric(kind: Kind, x: Array, w: Array, divisors: Array) -> tuple[Any, Any, Any]:
    extreme = x[np.abs(x).argmax()]
    step = best = curvature = F(0)
    for divisor in divisors:
        level = _levels(kind, x * (-divisor / extreme if extreme != 0 else F(0)), -kind.edge, kind.edge - 1)
        ll, xl = _sum(w * level * level), _sum(w * level * x)
        gain = xl * xl / ll if ll > 0 else F(0)
        if gain > best:
            step, best, curvature = xl / ll, gain, ll
    return step, F(0), curvature


def _affine(kind: Kind, x: Array, w: Array, divisors: Array) -> tuple[Any, Any, Any]:
    low = x.min() if kind.free else min(F(0), x.min())
    span = F(x.max() if kind.free else max(x[0], x.max())) - low
    x = x - low
    best: tuple[Any, Any, Any] = (F(0), F(0), F(np.inf))
    sum_w, sum_x, sum_xx = _sum(w), _sum(w * x), _sum(w * x * x)
    for divisor, shift in [*((d, s) for d in divisors for s in ggml.SHIFTS), (None, None)]:
        if divisor is None:  # once more, on the best
            inverse = F(1) / best[0] if best[0] > 0 else F(0)
            offset = best[1] * inverse
        else:
            inverse, offset = divisor / span if span > 0 else F(0), shift
        level = _levels(kind, x * inverse + offset, 0, kind.most)
        one, two, three = _sum(w * level), _sum(w * level * level), _sum(w * level * x)
        d = sum_w * two - one * one
        both = d > SINGULAR * (sum_w * two)
        m = (two * sum_x - one * three) / d if both else -offset / inverse
        above = m > -low and not kind.free
        m = -low if above else m
        s = (sum_w * three - sum_x * one) / d if both and not above else (three - m * one) / two
        error = sum_xx + s * (s * two + F(2) * (m * one - three)) + m * (m * sum_w - F(2) * sum_x)
        if s > 0 and s * F(kind.most) <= F(2) * span and error < best[2]:
            best = (s, -m, error)
    return best[0], best[1] - low, F(0)


def _stored(kind: Kind, values: Array, weights: Array, step: Array, minimum: Array, curvature: Array) -> Scales:
    if kind.integers is None:
        ones = np.ones_like(step)
        return Scales(ggml.halves(step[:, 0]), ggml.halves(minimum[:, 0]), ones, ones)
    units = np.zeros((2, len(step)), np.float16)
    if kind.affine:
        units[0] = ggml.halves(step.max(1) / F(kind.integers[1]))
        units[1] = ggml.halves(minimum.max(1) / F(kind.minima))
    else:
        units[0] = ggml.halves(np.array([_unit(kind, *block) for block in zip(step, curvature, strict=True)]))
    fitted = np.stack([step.reshape(-1), minimum.reshape(-1)])
    whole, errors = _around(kind, values, weights, units, fitted)
    if kind.affine:
        again = ggml.solved(kind, _sums(kind, values, weights, units, whole), units)
        second, others = _around(kind, values, weights, again, np.repeat(again.astype(F), kind.per_block, 1) * whole)
        better = others < errors
        units = np.where(better, again, units)
        whole = np.where(np.repeat(better, kind.per_block), second, whole)
    return Scales(units[0], units[1], *whole.reshape(2, *step.shape))


def _unit(kind: Kind, step: Array, curvature: Array) -> Any:
    assert kind.integers is not None
    least, largest = F(kind.integers[0]), F(kind.integers[1])
    far, low, high = step[np.abs(step).argmax()], min(F(0), step.min()), max(F(0), step.max())
    unit = -max(high / -least, -low / largest) if far > 0 else max(-low / -least, high / largest)
    whole = np.rint(np.clip(step / unit if unit != 0 else F(0) * step, least, largest)).astype(np.float64)
    square = sum((curvature.astype(np.float64) * whole * whole).tolist())
    product = sum((curvature.astype(np.float64) * whole * step.astype(np.float64)).tolist())
    return product / square if square > 0 else np.float64(unit)


def _around(kind: Kind, values: Array, weights: Array, units: Array, fitted: Array) -> tuple[Array, Array]:
    """The best integers near those, and the errors of the blocks."""
    assert kind.integers is not None
    spread, found, errors = np.repeat(units.astype(F), kind.per_block, 1), np.empty_like(fitted), np.empty(len(values), F)
    whole, shares = np.where(spread != 0, fitted / spread, F(0)).astype(F), _shares(weights)
    lows, highs = (kind.integers[0], 0.0), (kind.integers[1], kind.minima)
    for i, values_of in enumerate(values):
        x, w, top = _normal(values_of, weights[i % len(weights)])
        start = [np.rint(np.clip(whole[k, i], F(lows[k]), F(highs[k]))) for k in range(2)]
        inverse_top, best = F(1) / top if top > 0 else F(0), F(np.inf)
        found[:, i] = start
        for pair in ggml.NEAR if kind.affine else ggml.NEAR_STEP:
            a, b = (np.clip(F(start[k] + pair[k]), F(lows[k]), F(highs[k])) for k in range(2))
            s, m = F(F(spread[0, i] * a) * inverse_top), F(F(spread[1, i] * b) * inverse_top)
            level = _levels(kind, (x + m) * (F(1) / s if s != 0 else F(0)), -kind.edge, kind.most - kind.edge)
            error = _sum(w * (x - (s * level - m)) * (x - (s * level - m)))
            if error < best:
                best, found[:, i] = error, (a, b)
        errors[i] = F(best * top * top) * shares[i % len(shares)]
    return found, errors.reshape(-1, kind.per_block).sum(1, dtype=np.float64)


def _sums(kind: Kind, values: Array, weights: Array, units: Array, whole: Array) -> Array:
    spread, sums = np.repeat(units.astype(F), kind.per_block, 1), np.empty((5, len(values)), F)
    for i, values_of in enumerate(values):
        x, w, top = _normal(values_of, weights[i % len(weights)])
        s, m = whole[0, i], whole[1, i]
        step = F(spread[0, i] * s)
        inverse, shift = (top / step, F(spread[1, i] * m) / step) if step != 0 else (F(0), F(0))
        q = _levels(kind, x * inverse + shift, -kind.edge, kind.most - kind.edge)
        qq, one, ones, xq, xs = _sum(w * q * q), _sum(w * q), _sum(w), _sum(w * q * x), _sum(w * x)
        sums[:, i] = (s * s * qq, s * m * one, m * m * ones, top * s * xq, top * m * xs)
        sums[:, i] *= _shares(weights)[i % len(weights)]
    return sums


def _codes(kind: Kind, x: Array, step: Any, minimum: Any) -> Array:
    inverse = F(1) / step if step != 0 else F(0)
    inverse = F(0) if np.isinf(inverse) else inverse
    if kind.table:
        return (x[:, None] * inverse > (UNEVEN[1:] + UNEVEN[:-1]) * F(0.5)).sum(1)
    return _levels(kind, (x + minimum) * inverse, -kind.edge, kind.most - kind.edge) + F(kind.edge)
