"""Q3_K: 256 codes of 3 bits, 6 signed bits for the step of every 16 of them, and what one is worth in float16."""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Array, Kind, Scales

KIND = Kind("Q3_K", 16, 4, 7, tuple(3.1 + 0.25 * k for k in range(8)), integers=(-32, 31))


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    blocks[:, 96:108] = _packed((scales.steps + 32).astype(np.uint8))
    ggml.put_half(blocks, 108, scales.step)
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    step, steps = ggml.take_half(found, 108), _unpacked(found[:, 96:108]).astype(np.float32) - 32
    scales = Scales(step, np.zeros_like(step), steps, np.zeros_like(steps))
    return ggml.as_rows(ggml.decode(KIND, scales, found), len(blocks))


def _packed(steps: Array) -> Array:
    """uint8 [blocks, 12] of 16 numbers below 64: the low four bits of all, then the high two."""
    low = steps[:, :8] & 15 | (steps[:, 8:] & 15) << 4
    high = steps.reshape(-1, 4, 4) >> 4
    return np.concatenate([low, high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6], 1)


def _unpacked(stored: Array) -> Array:
    """And back."""
    low = np.concatenate([stored[:, :8] & 15, stored[:, :8] >> 4], 1)
    high = np.concatenate([stored[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    together: Array = low | high << 4
    return together
