"""The Walsh-Hadamard transform in plain torch, on any device: what the compiled `hadamard` is held to, bit for bit."""

from __future__ import annotations

import torch


def transform(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Every `block` columns of [rows, in] times the plain +-1 matrix H of Sylvester, in the dtype of the matrix.

    `block` is a power of two and divides the columns. H is symmetric, and H H = block I. Butterflies of neighbours first, then
    of 2, 4, … apart, each rounded to the dtype: bfloat16 comes out as FastDeploy's kernel computes it
    (PaddlePaddle/FastDeploy, custom_ops/gpu_ops/moe/moe_fast_hardamard_impl.cuh: in the dtype of the activations).
    """
    result, step = matrix, 1
    while step < block:
        first, second = result.reshape(-1, 2, step).unbind(1)
        result = torch.stack((first + second, first - second), 1)
        step *= 2
    return result.reshape(matrix.shape).clone() if result is matrix else result.reshape(matrix.shape)
