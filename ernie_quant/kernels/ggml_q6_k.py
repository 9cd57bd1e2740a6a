"""Q6_K: 256 codes of 6 bits, a signed byte for the step of every 16 of them, and what one is worth in float16."""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind, Scales

KIND = Kind("Q6_K", 16, 32, 63, tuple(29 + 0.5 * k for k in range(9)), integers=(-128, 127))


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    blocks[:, 192:208] = scales.steps.astype(np.int8).view(np.uint8)
    ggml.put_half(blocks, 208, scales.step)
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    steps, step = found[:, 192:208].view(np.int8).astype(np.float32), ggml.take_half(found, 208)
    scales = Scales(step, np.zeros_like(step), steps, np.zeros_like(steps))
    return ggml.as_rows(ggml.decode(KIND, scales, found), len(blocks))
