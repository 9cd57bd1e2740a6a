"""NVFP4 as its specification has it, in numpy: e4m3, e2m1, and what becomes of inputs. Nothing is ernie_quant's."""

from __future__ import annotations

import numpy as np

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(byte: np.ndarray) -> np.ndarray:
    """f64: sign, four bits of exponent with the bias 7, three of mantissa; no infinity, and NaN where all seven are set."""
    byte = np.asarray(byte).astype(np.int64)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(byte & 0x7F == 0x7F, np.nan, np.where(byte & 0x80, -value, value))


def decoded(packed: np.ndarray, scale: np.ndarray, of_all: float) -> np.ndarray:
    """f64 [N, K] of bytes [N, K / 2] and scales [N, K / 16]: the even input in the low nibble, bit 3 its sign."""
    nibbles = np.stack([packed % 16, packed // 16], -1).reshape(len(packed), -1)
    values = MAGNITUDES[nibbles % 8] * np.where(nibbles >= 8, -1, 1)
    return values * np.repeat(e4m3(scale), 16, axis=1) / of_all


def _nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The number of `grid` (rising, its even ones first in a tie) nearest to x."""
    above = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    low, high = x - grid[above - 1], grid[above] - x
    return np.where((low < high) | ((low == high) & ((above - 1) % 2 == 0)), grid[above - 1], grid[above])


def rounded(inputs: np.ndarray, of_all: float) -> np.ndarray:
    """f64 [tokens, K]: every 16 inputs at an e4m3 scale of of_all x max|x| / 6, in e2m1; both to the nearest, half to even."""
    grid = e4m3(np.arange(0x7F))
    x = inputs.astype(np.float64).reshape(len(inputs), -1, 16)
    scale = _nearest(np.minimum(np.abs(x).max(-1, keepdims=True) * of_all / 6, 448), grid) / of_all
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(scale > 0, np.abs(x) / scale, 0)
    return (_nearest(np.minimum(ratio, 6), MAGNITUDES) * np.sign(x) * scale).reshape(inputs.shape)
