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
        fits = [_fit(kind, x, weights[i % per_row]) for i, x in enumerate(values)]
        step, minimum = (np.array([fit[k] for fit in fits], F).reshape(-1, kind.per_block) for k in range(2))
        scales = _stored(kind, values, weights, step, minimum)
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


def _sum(values: Array) -> Any:
    total = F(0)
    for value in values:  # from the first to the last, as the loops do
        total = F(total + value)
    return total


def _levels(kind: Kind, scaled: Array, low: float, high: float) -> Array:
    if kind.table:
        middle = (ggml.UNEVEN[1:] + ggml.UNEVEN[:-1]) * F(0.5)
        return ggml.UNEVEN[(scaled[:, None] > middle).sum(1)]
    return np.rint(np.clip(scaled, F(low), F(high))).astype(F)


def _fit(kind: Kind, x: Array, importance: Array) -> tuple[Any, Any]:
    x, w, top = _normal(x, importance)
    step, minimum = (_affine if kind.affine else _symmetric)(kind, x, w)
    return F(step * top), F(minimum * top)


def _symmetric(kind: Kind, x: Array, w: Array) -> tuple[Any, Any]:
    extreme = x[np.abs(x).argmax()]
    step = best = F(0)
    for divisor in np.array(kind.divisors, F):
        level = _levels(kind, x * (-divisor / extreme if extreme != 0 else F(0)), -kind.edge, kind.edge - 1)
        ll, xl = _sum(w * level * level), _sum(w * x * level)
        gain = xl * xl / ll if ll > 0 else F(0)
        if gain > best:
            step, best = xl / ll, gain
    return step, F(0)


def _affine(kind: Kind, x: Array, w: Array) -> tuple[Any, Any]:
    low = x.min() if kind.free else min(F(0), x.min())
    span = F(x.max() if kind.free else max(x[0], x.max())) - low
    best: tuple[Any, Any, Any] = (F(0), -low, F(np.inf))
    sum_w, sum_x, sum_xx = _sum(w), _sum(w * x), _sum(w * x * x)
    grids = [(d, s) for d in np.array(kind.divisors, F) for s in ggml.SHIFTS]
    for divisor, shift in [*grids, (None, None)]:
        if divisor is None:  # once more, on the best
            inverse = F(1) / best[0] if best[0] > 0 else F(0)
            offset = best[1] * inverse
        else:
            inverse = divisor / span if span > 0 else F(0)
            offset = shift - low * inverse
        level = _levels(kind, x * inverse + offset, 0, kind.most)
        one, two, three = _sum(w * level), _sum(w * level * level), _sum(w * x * level)
        d = sum_w * two - one * one
        s, m = ((sum_w * three - sum_x * one) / d, (two * sum_x - one * three) / d) if d > 0 else (F(0), F(0))
        if not d > 0 or (m > 0 and not kind.free):
            m, s = F(0), three / two if two > 0 else F(0)
        error = sum_xx - s * three - m * sum_x
        if s > 0 and error < best[2]:
            best = (s, -m, error)
    return best[0], best[1]


def _stored(kind: Kind, values: Array, weights: Array, step: Array, minimum: Array) -> Scales:
    if kind.integers is None:
        ones = np.ones_like(step)
        return Scales(ggml.halves(step[:, 0]), ggml.halves(minimum[:, 0]), ones, ones)
    least, largest = kind.integers
    extreme = np.array([row[np.abs(row).argmax()] for row in step], F)
    units = np.zeros((2, len(step)), np.float16)
    units[0] = ggml.halves(extreme / F(largest if least == 0 else least))
    if kind.affine:
        units[1] = ggml.halves(minimum.max(1) / F(kind.minima))
    spread = np.repeat(units.astype(F), kind.per_block, 1)
    fitted = np.stack([step.reshape(-1), minimum.reshape(-1)])
    whole = np.where(spread != 0, np.rint(fitted / spread), F(0)).astype(F)
    whole, errors = _around(kind, values, weights, units, whole)
    if kind.affine:
        again = ggml.solved(kind, _sums(kind, values, weights, units, whole), units)
        second, others = _around(kind, values, weights, again, whole)
        better = others < errors
        units = np.where(better, again, units)
        whole = np.where(np.repeat(better, kind.per_block), second, whole)
    return Scales(units[0], units[1], *whole.reshape(2, *step.shape))


def _around(kind: Kind, values: Array, weights: Array, units: Array, whole: Array) -> tuple[Array, Array]:
    """The best integers near those, and the errors of the blocks."""
    assert kind.integers is not None
    spread, found, errors = np.repeat(units.astype(F), kind.per_block, 1), np.empty_like(whole), np.empty(len(values), F)
    lows, highs = (kind.integers[0], 0.0), (kind.integers[1], kind.minima)
    for i, values_of in enumerate(values):
        x, w, top = _normal(values_of, weights[i % len(weights)])
        share = weights[i % len(weights)].max()
        start = [np.clip(whole[k, i], F(lows[k]), F(highs[k])) for k in range(2)]
        inverse_top, best = F(1) / top if top > 0 else F(0), F(np.inf)
        found[:, i] = start
        for pair in ggml.NEAR if kind.affine else ggml.NEAR_STEP:
            a, b = (np.clip(F(start[k] + pair[k]), F(lows[k]), F(highs[k])) for k in range(2))
            s, m = F(F(spread[0, i] * a) * inverse_top), F(F(spread[1, i] * b) * inverse_top)
            level = _levels(kind, (x + m) * (F(1) / s if s != 0 else F(0)), -kind.edge, kind.most - kind.edge)
            error = _sum(w * (x - (s * level - m)) * (x - (s * level - m)))
            if error < best:
                best, found[:, i] = error, (a, b)
        errors[i] = best * top * top * (share if 0 < share < np.inf else F(0))
    return found, errors.reshape(-1, kind.per_block).sum(1, dtype=np.float64)


def _sums(kind: Kind, values: Array, weights: Array, units: Array, whole: Array) -> Array:
    spread, sums = np.repeat(units.astype(F), kind.per_block, 1), np.empty((5, len(values)), F)
    for i, values_of in enumerate(values):
        x, w, top = _normal(values_of, weights[i % len(weights)])
        share = weights[i % len(weights)].max()
        share = share if 0 < share < np.inf else F(0)
        s, m = whole[0, i], whole[1, i]
        step = F(spread[0, i] * s)
        inverse, shift = (top / step, F(spread[1, i] * m) / step) if step != 0 else (F(0), F(0))
        q = _levels(kind, x * inverse + shift, -kind.edge, kind.most - kind.edge)
        qq, one, ones, xq, xs = _sum(w * q * q), _sum(w * q), _sum(w), _sum(w * x * q), _sum(w * x)
        sums[:, i] = (
            share * s * s * qq, share * s * m * one, share * m * m * ones, share * top * s * xq, share * top * m * xs,
        )  # fmt: skip
    return sums


def _codes(kind: Kind, x: Array, step: Any, minimum: Any) -> Array:
    inverse = F(1) / step if step != 0 else F(0)
    inverse = F(0) if np.isinf(inverse) else inverse
    if kind.table:
        return (x[:, None] * inverse > (ggml.UNEVEN[1:] + ggml.UNEVEN[:-1]) * F(0.5)).sum(1)
    return _levels(kind, (x + minimum) * inverse, -kind.edge, kind.most - kind.edge) + F(kind.edge)
