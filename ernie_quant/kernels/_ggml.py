"""Blocks of ggml, written and read: what is the same for all types. A type's own file says what differs.

Sources: ggml-org/llama.cpp, ggml/src/ggml-common.h (layouts) and ggml-quants.c (decoders, which these equal to the bit).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ernie_quant.dtypes import BLOCKS
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels import _ggml_choose as choose
from ernie_quant.kernels import _ggml_search as search

F = np.float32
CHUNK = 1 << 18  # values
HALF_MOST = F(65504.0)  # float16's largest
NONE = np.empty(0, F)
SHIFTS = np.array([-0.45, -0.15, 0.15, 0.45], F)  # steps between the lower end of a range and that of a grid
# what is tried around stored integers: a larger step wants a larger minimum, the other two rarely win
NEAR = np.array([(0, 0), (1, 1), (-1, -1), (1, 0), (0, 1), (-1, 0), (0, -1)], F)
NEAR_STEP = np.array([(0, 0), (1, 0), (-1, 0)], F)
SINGULAR = 1e-6
UNEVEN = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), F)  # kvalues_iq4nl

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Kind:
    """Codes 0 to `most` are worth step * (code - edge) - minimum, or step * table[code], in sub-blocks of `size`.

    `affine`: it has minima; `free`: of any sign. `top`: the largest integer that stands for a step in a block that has one
    scale for several of them, (least, largest); None where a sub-block is a block.
    """

    dtype: str
    size: int
    edge: float
    most: float
    divisors: tuple[float, ...]
    affine: bool = False
    free: bool = False
    integers: tuple[float, float] | None = None
    minima: float = 0.0  # largest integer that stands for a minimum
    table: bool = False

    @property
    def per_block(self) -> int:
        """Sub-blocks."""
        return BLOCKS[self.dtype][0] // self.size

    @property
    def values(self) -> Array:
        """The table, if it has one."""
        return UNEVEN if self.table else NONE


@dataclass(frozen=True)
class Scales:
    """Of blocks: float16 units [blocks] of steps and minima, and the integers [blocks, sub-blocks] that multiply them."""

    step: Array
    minimum: Array
    steps: Array
    minima: Array

    def of_sub_blocks(self) -> tuple[Array, Array]:
        """float32 steps and minima [blocks * sub-blocks]."""
        step = self.step.astype(F)[:, None] * self.steps
        return step.reshape(-1), (self.minimum.astype(F)[:, None] * self.minima).reshape(-1)


def halves(values: Array) -> Array:
    """float16, and its largest number for what is above it."""
    return np.clip(values, -HALF_MOST, HALF_MOST).astype(np.float16)


def encode(kind: Kind, weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[Scales, Array]:
    """Scales and codes uint8 [blocks, elements] of a weight [rows, in]; so many rows at a time as a cache holds."""
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    weights = np.empty((0, kind.size), F)
    if importance is not None and importance.max() > 0:  # else all inputs are alike
        weights = importance.float().contiguous().numpy().reshape(-1, kind.size)
    found = [_encoded(kind, part.float().contiguous().numpy(), weights) for part in torch.split(weight, rows)]
    parts = [[getattr(scales, field.name) for scales, _ in found] for field in fields(Scales)]
    return Scales(*map(np.concatenate, parts)), np.concatenate([codes for _, codes in found])


def _encoded(kind: Kind, rows: Array, weights: Array) -> tuple[Scales, Array]:
    values = rows.reshape(-1, kind.size)
    step, minimum = np.empty(len(values), F), np.empty(len(values), F)
    edge, most, divisors = F(kind.edge), F(kind.most), np.array(kind.divisors, F)
    search.fit_all(values, weights, kind.size, kind.affine, kind.free, edge, most, divisors, SHIFTS, kind.values, step, minimum)
    scales = _rounded(kind, values, weights, step.reshape(-1, kind.per_block), minimum.reshape(-1, kind.per_block))
    codes = np.empty(values.shape, np.uint8)
    choose.nearest_all(values, kind.size, *scales.of_sub_blocks(), edge, most, kind.values, codes)
    return scales, codes.reshape(-1, BLOCKS[kind.dtype][0])


def _rounded(kind: Kind, values: Array, weights: Array, step: Array, minimum: Array) -> Scales:
    """Steps and minima [blocks, sub-blocks] as they are stored: by what they were fitted to, then by what came of that."""
    if kind.integers is None:
        ones = np.ones_like(step)
        return Scales(halves(step[:, 0]), halves(minimum[:, 0]), ones, ones)
    least, largest = kind.integers
    extreme = np.take_along_axis(step, np.abs(step).argmax(1)[:, None], 1)[:, 0]
    unit = halves(extreme / F(largest if least == 0 else least))
    lower = halves(minimum.max(1) / F(kind.minima)) if kind.affine else np.zeros_like(unit)
    fitted = np.stack([step.reshape(-1), minimum.reshape(-1)])
    spread = _spread(kind, np.stack([unit, lower]))
    whole = np.rint(np.divide(fitted, spread, out=np.zeros_like(fitted), where=spread != 0))
    first = _tried(kind, values, weights, np.stack([unit, lower]), whole)
    if not kind.affine:  # a second round gains a thousandth
        return Scales(first.units[0], first.units[1], *first.whole.reshape(2, *step.shape))
    second = _tried(kind, values, weights, _refitted(kind, values, weights, first), first.whole)
    better = second.errors < first.errors
    units = np.where(better, second.units, first.units)
    integers = np.where(np.repeat(better, kind.per_block), second.whole, first.whole).reshape(2, *step.shape)
    return Scales(units[0], units[1], integers[0], integers[1])


@dataclass(frozen=True)
class Trial:
    """Units float16 [2, blocks] of steps and minima, the integers [2, sub-blocks] that suit them best, errors [blocks]."""

    units: Array
    whole: Array
    errors: Array


def _tried(kind: Kind, values: Array, weights: Array, units: Array, whole: Array) -> Trial:
    assert kind.integers is not None
    limits = np.array([*kind.integers, 0, kind.minima], F)
    whole = np.clip(whole, limits[0::2, None], limits[1::2, None])
    errors = np.empty(len(values), F)
    edge, most, near = F(kind.edge), F(kind.most), NEAR if kind.affine else NEAR_STEP
    choose.choose(values, weights, kind.size, _spread(kind, units), edge, most, kind.values, limits, near, whole, errors)
    return Trial(units, whole, errors.reshape(-1, kind.per_block).sum(1, dtype=np.float64))


def _refitted(kind: Kind, values: Array, weights: Array, trial: Trial) -> Array:
    """Units by least squares of the integers and codes of a trial."""
    sums = np.empty((5, len(values)), F)
    units = _spread(kind, trial.units)
    choose.sums_of(values, weights, kind.size, units, F(kind.edge), F(kind.most), kind.values, trial.whole, sums)
    return solved(kind, sums, trial.units)


def solved(kind: Kind, sums: Array, units: Array) -> Array:
    """Units that the sums of `choose.sums_of` ask for, float32 [5, sub-blocks]; the old ones where they ask for none."""
    ss, sm, mm, xs, xm = sums.reshape(5, -1, kind.per_block).sum(2, dtype=np.float64)
    det = ss * mm - sm * sm
    both = det > SINGULAR * ss * mm
    with np.errstate(all="ignore"):
        unit = np.where(both, (xs * mm - xm * sm) / det, np.where(mm == 0, xs / ss, np.nan))
        lower = np.where(both, (xs * sm - xm * ss) / det, 0.0)
        good = np.isfinite(unit) & np.isfinite(lower) & (lower >= 0) & ((unit > 0) | (not kind.affine))
        return np.where(good, halves(np.stack([unit, lower])), units)


def _spread(kind: Kind, units: Array) -> Array:
    """float32 [2, sub-blocks]."""
    return np.repeat(units.astype(F), kind.per_block, axis=1)


def decode(kind: Kind, scales: Scales, blocks: Array) -> Array:
    """float32 [blocks, elements]."""
    codes = bits.codes_of(kind.dtype, blocks).reshape(-1, kind.size)
    out = np.empty(codes.shape, F)
    choose.expand(codes, *scales.of_sub_blocks(), F(kind.edge), kind.values, out)
    return out.reshape(len(blocks), -1)


def blocks_of(kind: Kind, tensor: torch.Tensor) -> Array:
    """uint8 [blocks, bytes] of uint8 [rows, bytes of a row]."""
    return tensor.contiguous().numpy().reshape(-1, BLOCKS[kind.dtype][1])


def empty(kind: Kind, blocks: int) -> Array:
    """Bytes of so many blocks."""
    return np.zeros((blocks, BLOCKS[kind.dtype][1]), np.uint8)


def as_rows(blocks: Array, rows: int) -> torch.Tensor:
    """uint8 or float32 [rows, …]."""
    return torch.from_numpy(blocks.reshape(rows, -1))


def put_half(blocks: Array, at: int, values: Array) -> None:
    """float16 [blocks] at a byte of every block."""
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def take_half(blocks: Array, at: int) -> Array:
    """And back."""
    return blocks[:, at : at + 2].copy().view("<f2")[:, 0]
