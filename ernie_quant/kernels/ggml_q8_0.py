"""Q8_0: a float16 step and 32 signed bytes."""

from __future__ import annotations

import numpy as np
import torch

from ernie_quant.kernels import _ggml as ggml
from ernie_quant.kernels._compiled import compiled
from ernie_quant.kernels._ggml import Kind

F = np.float32
KIND = Kind("Q8_0", 32, 128, 255, ())
MOST = F(127)
ROUND = F(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to an integer, half to even


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [rows, bytes] of a weight [rows, in], the nearest codes at max |w| / 127; importance does not matter."""
    values = weight.float().contiguous().numpy().reshape(-1, KIND.size)
    step = np.empty(len(values), F)
    _largest(values, step)
    half = ggml.halves(step / MOST)
    blocks = ggml.empty(KIND, len(values))
    ggml.put_half(blocks, 0, half)
    _codes(values, half.astype(F), blocks.view(np.int8))
    return ggml.as_rows(blocks, len(weight))


@compiled()
def _largest(values, step):  # type: ignore[no-untyped-def]
    for b in range(len(values)):
        largest = F(0)
        for j in range(values.shape[1]):
            largest = max(largest, abs(values[b, j]))
        step[b] = largest


@compiled()
def _codes(values, step, out):  # type: ignore[no-untyped-def]
    for b in range(len(values)):
        inverse = F(1) / step[b] if step[b] > 0 else F(0)
        for j in range(values.shape[1]):
            out[b, 2 + j] = np.int8((min(max(values[b, j] * inverse, -MOST), MOST) + ROUND) - ROUND)


def decode(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] of uint8 [rows, bytes]."""
    found = ggml.blocks_of(KIND, blocks)
    return ggml.as_rows(ggml.decode(KIND, ggml.one_step(found), found), len(blocks))


def pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes] of given codes int8 [rows, in] and scales float16 [rows, in / 32]."""
    blocks = ggml.empty(KIND, scale.numel())
    ggml.put_half(blocks, 0, scale.contiguous().numpy().reshape(-1))
    blocks[:, 2:] = codes.contiguous().numpy().reshape(-1, KIND.size).view(np.uint8)
    return ggml.as_rows(blocks, len(codes))
