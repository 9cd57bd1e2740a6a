"""IQ4_XS: 256 nibbles that number the values of a table, 6 signed bits for the step of every 32, and what one is worth."""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels._ggml import Kind, Scales

KIND = Kind("IQ4_XS", 32, 0, 15, (*(100 + 6.5 * k for k in range(9)), -106, -113, -122), integers=(-32, 31), table=True)


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in]; importance: float32 [in], mean of the squared inputs."""
    scales, codes = ggml.encode(KIND, weight, importance)
    blocks = ggml.empty(KIND, len(codes))
    steps = (scales.steps + 32).astype(np.uint8)
    ggml.put_half(blocks, 0, scales.step)
    high = ((steps >> 4).astype(np.uint16) << (2 * np.arange(8, dtype=np.uint16))).sum(1, dtype=np.uint16)
    blocks[:, 2:4] = high.astype("<u2").view(np.uint8).reshape(-1, 2)
    blocks[:, 4:8] = steps[:, 0::2] & 15 | (steps[:, 1::2] & 15) << 4
    bits.put_codes(KIND.dtype, codes, blocks)
    return ggml.as_rows(blocks, len(weight))


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    step = ggml.take_half(found, 0)
    high = found[:, 2:4].copy().view("<u2") >> (2 * np.arange(8, dtype=np.uint16)) & 3
    low = np.stack([found[:, 4:8] & 15, found[:, 4:8] >> 4], 2).reshape(-1, 8)
    steps = (low | high << 4).astype(np.float32) - 32
    scales = Scales(step, np.zeros_like(step), steps, np.zeros_like(steps))
    return ggml.as_rows(ggml.decode(KIND, scales, found), len(blocks))
