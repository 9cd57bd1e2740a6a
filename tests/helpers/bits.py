"""Random weights, bf16 by hand, and comparisons to the bit."""

from __future__ import annotations

import numpy as np
import torch

F = np.float32


def gaussian(rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def bf16(x: np.ndarray) -> np.ndarray:
    """f32 rounded to what bf16 can hold, half to even."""
    bits = x.astype(F).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(F)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Dtype, shape and bits: -0.0 is not 0.0."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
