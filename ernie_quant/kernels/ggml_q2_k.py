"""Q2_K: 256 codes of 2 bits, 4 bits each for step and minimum of every 16 of them, and what one is worth in float16."""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind, Scales

KIND = Kind("Q2_K", 16, 0, 3, (2.4, 2.8, 3.2, 3.6), affine=True, integers=(0, 15), minima=15)


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    blocks[:, :16] = scales.steps.astype(np.uint8) | scales.minima.astype(np.uint8) << 4
    ggml.put_half(blocks, 80, scales.step)
    ggml.put_half(blocks, 82, scales.minimum)
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    steps, minima = (found[:, :16] & 15).astype(np.float32), (found[:, :16] >> 4).astype(np.float32)
    scales = Scales(ggml.take_half(found, 80), ggml.take_half(found, 82), steps, minima)
    return ggml.as_rows(ggml.decode(KIND, scales, found), len(blocks))
