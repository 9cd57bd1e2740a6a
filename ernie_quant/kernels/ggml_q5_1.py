"""Q5_1: a float16 step, a float16 minimum, which has either sign and is added, and 32 codes of 5 bits."""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind, Scales

KIND = Kind("Q5_1", 32, 0, 31, (30.4, 30.8, 31.2, 31.6), affine=True, free=True)


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    ggml.put_half(blocks, 0, scales.step)
    ggml.put_half(blocks, 2, -scales.minimum)
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    one = np.ones((len(found), 1), np.float32)
    scales = Scales(ggml.take_half(found, 0), -ggml.take_half(found, 2), one, one)
    return ggml.as_rows(ggml.decode(KIND, scales, found), len(blocks))
