"""Blocks of ggml, written and read: what is the same for all types. A type's own file says what differs.

Sources: ggml-org/llama.cpp, ggml/src/ggml-common.h (layouts) and ggml-quants.c (decoders, which these equal to the bit).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from ernie_quant.dtypes import BLOCKS
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels import _ggml_choose as choose
from ernie_quant.kernels import _ggml_search as search
from ernie_quant.kernels._ggml_search import UNEVEN

F = np.float32
CHUNK = 1 << 18  # values
HALF_MOST = F(65504.0)  # float16's largest
SHIFTS = np.array([-0.45, -0.15, 0.15, 0.45], F)  # steps between the lower end of a range and that of a grid
# what is tried around stored integers: a larger step wants a larger minimum, the other two rarely win
NEAR = np.array([(0, 0), (1, 1), (-1, -1), (1, 0), (0, 1), (-1, 0), (0, -1)], F)
NEAR_STEP = np.array([(0, 0), (1, 0), (-1, 0)], F)
SINGULAR = 1e-6
# divisors beside a type's own, in ends of its range: where inputs matter unequally the largest may be one that does not
APART = (0.85, 1.2, 1.4, 1.7, 2.1)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Kind:
    """Codes 0 to `most` are worth step * (code - edge) - minimum, or step * table[code], in sub-blocks of `size`.

    `divisors`: what the search tries (`fit_affine`, `fit_step`). `affine`: it has minima; `free`: of any sign. `integers`: the
    least and the largest that stand for a step in a block that has one scale for several of them; None where a sub-block is one.
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
    def ends(self) -> tuple[float, float]:
        """Levels of the first and of the last code."""
        return (float(UNEVEN[0]), float(UNEVEN[-1])) if self.table else (-self.edge, self.most - self.edge)

    def tried(self, weighted: bool) -> Array:
        """Divisors float32, for inputs that matter equally or not."""
        apart = [-end * a for a in APART for end in self.ends] if weighted and not self.affine else []
        return np.array([*self.divisors, *apart], F)


class Weights(NamedTuple):
    """Of squared errors, or empty: float32 [sub-blocks, size], at most 1 in each, and what 1 is worth there.

    `within` has those of a row, then as many as a tile from the first on again; `shares` those of a row.
    """

    within: Array
    shares: Array

    def of_sub_blocks(self, found: Array) -> Array:
        """[…, sub-blocks] times their shares."""
        return found * np.resize(self.shares, found.shape[-1]) if len(self.shares) else found


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


def weights_of(kind: Kind, importance: torch.Tensor | None) -> Weights:
    """Sub-blocks in which no input matters, or one infinitely: all matter equally there, and the others decide for the block."""
    if importance is None or not importance.max() > importance.min():  # all matter equally, or some as much as no number says
        return Weights(np.empty((0, kind.size), F), np.empty(0, F))
    given = importance.float().contiguous().numpy().reshape(-1, kind.size)
    largest = given.max(1)
    good = (largest > 0) & (largest < np.inf)
    shares = np.where(good, largest, F(0))
    within = np.divide(given, largest[:, None], out=np.ones_like(given), where=good[:, None])
    again = np.resize(within, (len(within) + search.LANES, kind.size))  # a tile begins in one row and ends in the next
    return Weights(again, shares / shares.max() if good.any() else shares)


def encode(kind: Kind, weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[Scales, Array]:
    """Scales and codes uint8 [blocks, elements] of a weight [rows, in]; so many rows at a time as a cache holds."""
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    weights, elements = weights_of(kind, importance), BLOCKS[kind.dtype][0]
    codes = np.empty((weight.numel() // elements, elements), np.uint8)
    found = []
    for first, part in zip(range(0, len(weight), rows), torch.split(weight, rows), strict=True):
        values = part.float().contiguous().numpy().reshape(-1, kind.size)
        at = first * weight.shape[1] // elements
        with np.errstate(all="ignore"):  # weights beyond float16, whose blocks are lost anyhow
            found.append(_encoded(kind, values, weights, codes[at : at + part.numel() // elements].reshape(values.shape)))
    return Scales(*(np.concatenate([getattr(scales, field.name) for scales in found]) for field in fields(Scales))), codes


def _encoded(kind: Kind, values: Array, weights: Weights, codes: Array) -> Scales:
    """Scales of values [sub-blocks, size], and their codes, which are written."""
    step, minimum, curvature = np.empty((3, len(values)), F)
    edge, most, within = F(kind.edge), F(kind.most), weights.within
    grids = (edge, most, kind.tried(len(within) > 0), SHIFTS, kind.table)
    search.fit_all(values, within, kind.size, kind.affine, kind.free, *grids, step, minimum, curvature)
    scales = _rounded(kind, values, weights, np.stack([step, minimum]), weights.of_sub_blocks(curvature))
    units, whole = (np.stack(pair) for pair in ((scales.step, scales.minimum), (scales.steps, scales.minima)))
    choose.nearest_all(values, kind.size, units.astype(F), whole.reshape(2, -1), edge, most, kind.table, codes)
    return scales


def _rounded(kind: Kind, values: Array, weights: Weights, fitted: Array, curvature: Array) -> Scales:
    """Steps and minima [2, sub-blocks] as they are stored: by what they were fitted to, then by what came of that."""
    shape = (-1, kind.per_block)
    if kind.integers is None:
        ones = np.ones((len(values), 1), F)
        return Scales(halves(fitted[0]), halves(fitted[1]), ones, ones)
    trial = _tried(kind, values, weights, first_units(kind, fitted, curvature), fitted)
    if kind.affine:
        units = _refitted(kind, values, weights, trial)
        second = _tried(kind, values, weights, units, np.repeat(units.astype(F), kind.per_block, 1) * trial.whole)
        better = second.errors < trial.errors
        whole = np.where(np.repeat(better, kind.per_block), second.whole, trial.whole)
        trial = Trial(np.where(better, second.units, trial.units), whole, np.minimum(second.errors, trial.errors))
    return Scales(trial.units[0], trial.units[1], trial.whole[0].reshape(shape), trial.whole[1].reshape(shape))


def first_units(kind: Kind, fitted: Array, curvature: Array) -> Array:
    """float16 [2, blocks]: what 1 is worth in the integers that stand for what was fitted, [2, sub-blocks]."""
    assert kind.integers is not None
    step, minimum = fitted.reshape(2, -1, kind.per_block)
    if kind.affine:
        return halves(np.stack([step.max(1) / F(kind.integers[1]), minimum.max(1) / F(kind.minima)]))
    unit = np.zeros((2, len(step)))
    choose.unit_of(step, curvature.reshape(step.shape), F(kind.integers[0]), F(kind.integers[1]), unit[0])
    return halves(unit)


@dataclass(frozen=True)
class Trial:
    """Units float16 [2, blocks] of steps and minima, the integers [2, sub-blocks] that suit them best, errors [blocks]."""

    units: Array
    whole: Array
    errors: Array


def _tried(kind: Kind, values: Array, weights: Weights, units: Array, fitted: Array) -> Trial:
    assert kind.integers is not None
    limits, near = np.array([*kind.integers, 0, kind.minima], F), NEAR if kind.affine else NEAR_STEP
    whole, errors = np.empty_like(fitted), np.empty(len(values), F)
    scheme = (F(kind.edge), F(kind.most), kind.table, limits, near)
    choose.choose(values, weights.within, kind.size, units.astype(F), *scheme, fitted, whole, errors)
    return Trial(units, whole, weights.of_sub_blocks(errors).reshape(-1, kind.per_block).sum(1, dtype=np.float64))


def _refitted(kind: Kind, values: Array, weights: Weights, trial: Trial) -> Array:
    """Units by least squares of the integers and codes of a trial."""
    sums = np.empty((5, len(values)), F)
    scheme = (trial.units.astype(F), F(kind.edge), F(kind.most))
    choose.sums_of(values, weights.within, kind.size, *scheme, trial.whole, sums)
    return solved(kind, weights.of_sub_blocks(sums), trial.units)


def solved(kind: Kind, sums: Array, units: Array) -> Array:
    """Units that the sums of `choose.sums_of` ask for, float32 [5, sub-blocks]; the old ones where they ask for none."""
    with np.errstate(all="ignore"):
        ss, sm, mm, xs, xm = sums.reshape(5, -1, kind.per_block).sum(2, dtype=np.float64)
        det = ss * mm - sm * sm
        both = det > SINGULAR * ss * mm
        unit = np.where(both, (xs * mm - xm * sm) / det, np.where(mm == 0, xs / ss, np.nan))
        lower = np.where(both, (xs * sm - xm * ss) / det, 0.0)
        good = np.isfinite(unit) & np.isfinite(lower) & (lower >= 0) & ((unit > 0) | (not kind.affine))
        return np.where(good, halves(np.stack([unit, lower])), units)


def decode(kind: Kind, scales: Scales, blocks: Array) -> Array:
    """float32 [blocks, elements]."""
    codes = bits.codes_of(kind.dtype, blocks).reshape(-1, kind.size)
    out = np.empty(codes.shape, F)
    choose.expand(codes, *scales.of_sub_blocks(), F(kind.edge), kind.table, out)
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


def one_step(blocks: Array) -> Scales:
    """Of blocks that begin with the float16 step of all their codes."""
    one, step = np.ones((len(blocks), 1), F), take_half(blocks, 0)
    return Scales(step, np.zeros_like(step), one, one)


def put_half(blocks: Array, at: int, values: Array) -> None:
    """float16 [blocks] at a byte of every block."""
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def take_half(blocks: Array, at: int) -> Array:
    """And back."""
    return blocks[:, at : at + 2].copy().view("<f2")[:, 0]
