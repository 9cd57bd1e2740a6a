"""The Walsh-Hadamard transform of blocks of inputs: rotates outliers of activations away (FastDeploy's W4A8).

Butterflies, log2(block) additions per element and in a fixed order, where a product with the matrix would take `block`.
"""

from __future__ import annotations

import torch

from ernie_quant.kernels import hadamard_reference
from ernie_quant.kernels._compiled import compiled


def transform(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """`hadamard_reference.transform`: every `block` columns of [rows, in] times H, in the dtype of the matrix."""
    if matrix.dtype != torch.float32 or block < 8:
        return hadamard_reference.transform(matrix, block)
    result = torch.empty(matrix.shape)
    _transform(matrix.contiguous().view(-1).numpy(), block, result.view(-1).numpy())
    return result


@compiled()
def _transform(source, block, result):  # type: ignore[no-untyped-def]
    for first in range(0, source.size, block):
        line = result[first : first + block]
        _by_eights(source[first : first + block], line)
        step = 8
        while step < block:
            for left in range(0, block, 2 * step):
                low, high = line[left : left + step], line[left + step : left + 2 * step]
                for i in range(step):
                    a, b = low[i], high[i]
                    low[i], high[i] = a + b, a - b
            step *= 2


@compiled()
def _by_eights(x, line):  # type: ignore[no-untyped-def]
    """Neighbours, then 2 and 4 apart: eight numbers stay in registers."""
    for i in range(0, x.size, 8):
        a, b, c, d, e, f, g, h = x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5], x[i + 6], x[i + 7]
        a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
        a, c, b, d, e, g, f, h = a + c, a - c, b + d, b - d, e + g, e - g, f + h, f - h
        line[i], line[i + 4] = a + e, a - e
        line[i + 1], line[i + 5] = b + f, b - f
        line[i + 2], line[i + 6] = c + g, c - g
        line[i + 3], line[i + 7] = d + h, d - h
