"""Q4_0: a float16 step and 32 nibbles."""

from __future__ import annotations

import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind

KIND = Kind("Q4_0", 32, 8, 15, tuple(7.1 + 0.3 * k for k in range(7)))


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


def pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes] of given codes int8 [rows, in] from -8 to 7, and scales float16 [rows, in / 32]."""
    blocks = ggml.empty(KIND, scale.numel())
    ggml.put_half(blocks, 0, scale.contiguous().numpy().reshape(-1))
    bits.put_codes(KIND.dtype, (codes + 8).to(torch.uint8).contiguous().numpy().reshape(-1, KIND.size), blocks)
    return ggml.as_rows(blocks, len(codes))
