"""Sums of squares of a weight and of what became of it, in one pass."""

from __future__ import annotations

import math

import numpy as np
import torch

from ernie_quant.kernels._compiled import compiled

F = np.float32


def squares(weight: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float, float]:
    """||W - W'||^2, ||W||^2 and max |W - W'| of two bf16 or f32 matrices.

    Sums in float64 in a fixed order, so that a report does not depend on the machine. A NaN or an infinity in the
    weight shows in ||W||^2.
    """
    left, left_shift = _bits(weight)
    right, right_shift = _bits(decoded)
    sums = np.zeros((2, weight.shape[1]))
    largest = _squares(left, left_shift, right, right_shift, sums)
    return math.fsum(sums[0]), math.fsum(sums[1]), float(largest)


def _bits(matrix: torch.Tensor) -> tuple[np.ndarray, np.uint32]:
    half = matrix.dtype == torch.bfloat16
    return matrix.contiguous().view(torch.uint16 if half else torch.uint32).numpy(), np.uint32(16 if half else 0)


@compiled()
def _squares(left, left_shift, right, right_shift, sums):  # type: ignore[no-untyped-def]
    rows, columns = left.shape
    x, y, top = np.empty(columns, F), np.empty(columns, F), np.zeros(columns, F)
    x_bits, y_bits = x.view(np.uint32), y.view(np.uint32)
    error, total = sums[0], sums[1]
    for r in range(rows):
        for c in range(columns):
            x_bits[c] = np.uint32(left[r, c]) << left_shift
            y_bits[c] = np.uint32(right[r, c]) << right_shift
        for c in range(columns):
            d = np.float64(x[c]) - np.float64(y[c])
            error[c] += d * d
            total[c] += np.float64(x[c]) * np.float64(x[c])
            top[c] = max(top[c], abs(x[c] - y[c]))
    return np.max(top)


def squares_reference(weight: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float, float]:
    """`squares` in plain torch; the sums in another order."""
    x, y = weight.double(), decoded.double()
    return (x - y).square().sum().item(), x.square().sum().item(), (weight.float() - decoded.float()).abs().max().item()
