"""IQ4_NL: a float16 step and 32 nibbles that number the values of a table."""

from __future__ import annotations

import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind

KIND = Kind("IQ4_NL", 32, 0, 15, (*(100 + 6.5 * k for k in range(9)), -106, -113, -122), table=True)


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
