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
    step, minimum, best = F(0), -low, F(np.inf)
    sum_w, sum_x, sum_xx = _sum(w), _sum(w * x), _sum(w * x * x)
    for divisor in np.array(kind.divisors, F):
        span = x.max() + minimum
        level = _levels(kind, (x + minimum) * (divisor / span if span > 0 else F(0)), 0, kind.most)
        one, two, three = _sum(w * level), _sum(w * level * level), _sum(w * x * level)
        d = sum_w * two - one * one
        s, m = ((sum_w * three - sum_x * one) / d, (two * sum_x - one * three) / d) if d > 0 else (F(0), F(0))
        if not d > 0 or (m > 0 and not kind.free):
            m, s = F(0), three / two if two > 0 else F(0)
        error = sum_xx - s * three - m * sum_x
        if s > 0 and error < best:
            step, minimum, best = s, -m, error
    return step, minimum


def _stored(kind: Kind, values: Array, weights: Array, step: Array, minimum: Array) -> Scales:
    if kind.integers is None:
        ones = np.ones_like(step)
        return Scales(ggml.halves(step[:, 0]), ggml.halves(minimum[:, 0]), ones, ones)
    least, largest = kind.integers
    steps, minima = np.empty_like(step), np.empty_like(step)
    units = []
    for b in range(len(step)):
        extreme = step[b][np.abs(step[b]).argmax()]
        unit = ggml.halves(np.array([extreme / F(largest if least == 0 else least)], F))[0]
        lower = ggml.halves(np.array([minimum[b].max() / F(kind.minima)], F))[0] if kind.affine else np.float16(0)
        units.append((unit, lower))
        for k in range(kind.per_block):
            i = b * kind.per_block + k
            steps[b, k], minima[b, k] = _chosen(
                kind, values[i], weights[i % len(weights)], F(unit), F(lower), step[b, k], minimum[b, k]
            )
    return Scales(*(np.array([u[n] for u in units], np.float16) for n in range(2)), steps, minima)


def _chosen(kind: Kind, x: Array, importance: Array, unit: Any, lower: Any, step: Any, minimum: Any) -> tuple[Any, Any]:
    assert kind.integers is not None
    (least, largest), radius = kind.integers, kind.radius
    whole = np.clip(np.rint(step / unit) if unit != 0 else F(0), least, largest)
    offset = np.clip(np.rint(minimum / lower) if lower != 0 else F(0), 0, kind.minima)
    x, w, top = _normal(x, importance)
    inverse_top = F(1) / top if top > 0 else F(0)
    best, found = F(np.inf), (whole, offset)
    around = range(-radius, radius + 1)
    for a in around:
        for b in around if kind.minima > 0 else [0]:
            pair = np.clip(F(whole + a), F(least), F(largest)), np.clip(F(offset + b), F(0), F(kind.minima))
            s, m = F(F(unit * pair[0]) * inverse_top), F(F(lower * pair[1]) * inverse_top)
            inverse = F(1) / s if s != 0 else F(0)
            level = _levels(kind, (x + m) * inverse, -kind.edge, kind.most - kind.edge)
            d = x - (s * level - m)
            error = _sum(w * d * d)
            if error < best:
                best, found = error, pair
    return found


def _codes(kind: Kind, x: Array, step: Any, minimum: Any) -> Array:
    inverse = F(1) / step if step != 0 else F(0)
    inverse = F(0) if np.isinf(inverse) else inverse
    if kind.table:
        return (x[:, None] * inverse > (ggml.UNEVEN[1:] + ggml.UNEVEN[:-1]) * F(0.5)).sum(1)
    return _levels(kind, (x + minimum) * inverse, -kind.edge, kind.most - kind.edge) + F(kind.edge)
