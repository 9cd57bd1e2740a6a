"""Q5_0: a float16 step and 32 codes of 5 bits."""

from __future__ import annotations

import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind

KIND = Kind("Q5_0", 32, 16, 31, (*(14.8 + 0.4 * k for k in range(7)), -15, -15.5))


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    ggml.put_half(blocks, 0, scales.step)
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    return ggml.as_rows(ggml.decode(KIND, ggml.one_step(found), found), len(blocks))
