"""Twelve bytes that hold eight steps and eight minima of 6 bits each, as in Q4_K and Q5_K (ggml-quants.c, get_scale_min_k4)."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._ggml import Array


def packed(steps: Array, minima: Array) -> Array:
    """uint8 [blocks, 12] of whole numbers below 64, [blocks, 8] each."""
    s, m = steps.astype(np.uint8), minima.astype(np.uint8)
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (s, m)]
    return np.concatenate([*first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1)


def unpacked(stored: Array) -> tuple[Array, Array]:
    """And back, in float32."""
    high, last = stored[:, :8] >> 6 << 4, stored[:, 8:]
    s = np.concatenate([stored[:, :4] & 63, last & 15 | high[:, :4]], 1)
    m = np.concatenate([stored[:, 4:8] & 63, last >> 4 | high[:, 4:]], 1)
    return s.astype(np.float32), m.astype(np.float32)
