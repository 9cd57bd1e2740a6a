"""Q4_K: 256 codes of 4 bits, 6 bits each for step and minimum of every 32 of them, and what one is worth in float16."""

from __future__ import annotations

import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels import _ggml_six_bits as six_bits
from ernie_quant.kernels._ggml import Kind, Scales

KIND = Kind("Q4_K", 32, 0, 15, (14.4, 14.8, 15.2, 15.6), affine=True, integers=(0, 63), minima=63)


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    ggml.put_half(blocks, 0, scales.step)
    ggml.put_half(blocks, 2, scales.minimum)
    blocks[:, 4:16] = six_bits.packed(scales.steps, scales.minima)
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    steps, minima = six_bits.unpacked(found[:, 4:16])
    scales = Scales(ggml.take_half(found, 0), ggml.take_half(found, 2), steps, minima)
    return ggml.as_rows(ggml.decode(KIND, scales, found), len(blocks))
