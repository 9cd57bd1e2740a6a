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


def every_bf16() -> torch.Tensor:
    """All that are finite, and 512 zeros: bf16 [65536], from 0 up to the largest and then the negative ones."""
    values = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
    return torch.where(values.isfinite(), values, 0)


SHUFFLED = torch.randperm(65536, generator=torch.Generator().manual_seed(1))
# weights on which a compiled kernel of groups is held to the plain one; 32 divides their inputs
ODD_WEIGHTS = {
    "Gaussian": lambda: gaussian(67, 512),
    "Gaussian, f32": lambda: gaussian(67, 512).float() * 1.001,
    "every bf16, alike in a group": lambda: every_bf16().reshape(512, 128),
    "every bf16, shuffled": lambda: every_bf16()[SHUFFLED].reshape(128, 512),
    "denormals, f32": lambda: gaussian(8, 64).float() * 2.0**-124,
    "f16": lambda: gaussian(8, 64).half(),
    "of a larger matrix": lambda: gaussian(64, 512)[3:, 128:256],
}
