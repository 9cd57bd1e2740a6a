"""Blocks of ggml, written and read: what is the same for all types. A type's own file says what differs.

Sources: ggml-org/llama.cpp, ggml/src/ggml-common.h (layouts) and ggml-quants.c (decoders, which these equal to the bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ernie_quant.dtypes import BLOCKS
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels import _ggml_choose as choose
from ernie_quant.kernels import _ggml_search as search

F = np.float32
HALF_MOST = F(65504.0)  # float16's largest
NONE = np.empty(0, F)
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
    radius: int = 1

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
    """Scales and codes uint8 [blocks, elements] of a weight [rows, in]."""
    values = weight.float().contiguous().numpy().reshape(-1, kind.size)
    weights = np.empty((0, kind.size), F)
    if importance is not None:
        weights = importance.float().contiguous().numpy().reshape(-1, kind.size)
    step, minimum = np.empty(len(values), F), np.empty(len(values), F)
    edge, most, divisors = F(kind.edge), F(kind.most), np.array(kind.divisors, F)
    search.fit_all(values, weights, kind.size, kind.affine, kind.free, edge, most, divisors, kind.values, step, minimum)
    scales = _rounded(kind, values, weights, step.reshape(-1, kind.per_block), minimum.reshape(-1, kind.per_block))
    codes = np.empty(values.shape, np.uint8)
    choose.nearest_all(values, kind.size, *scales.of_sub_blocks(), edge, most, kind.values, codes)
    return scales, codes.reshape(-1, BLOCKS[kind.dtype][0])


def _rounded(kind: Kind, values: Array, weights: Array, step: Array, minimum: Array) -> Scales:
    """Steps and minima [blocks, sub-blocks] as they are stored."""
    if kind.integers is None:
        ones = np.ones_like(step)
        return Scales(halves(step[:, 0]), halves(minimum[:, 0]), ones, ones)
    least, largest = kind.integers
    extreme = np.take_along_axis(step, np.abs(step).argmax(1)[:, None], 1)[:, 0]
    unit = halves(extreme / F(largest if least == 0 else least))
    unit_minimum = halves(minimum.max(1) / F(kind.minima)) if kind.affine else np.zeros_like(unit)
    units = np.stack([np.repeat(u.astype(F), kind.per_block) for u in (unit, unit_minimum)])
    whole = np.stack([step.reshape(-1), minimum.reshape(-1)])
    whole = np.rint(np.divide(whole, units, out=np.zeros_like(whole), where=units != 0))
    limits = np.array([least, largest, 0, kind.minima], F)
    whole = np.clip(whole, limits[0::2, None], limits[1::2, None])
    edge, most = F(kind.edge), F(kind.most)
    choose.choose(values, weights, kind.size, units, edge, most, kind.values, limits, kind.radius, whole)
    return Scales(unit, unit_minimum, *(w.reshape(step.shape) for w in whole))


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
