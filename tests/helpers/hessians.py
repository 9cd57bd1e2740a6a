"""Second moments of inputs that do not exist."""

from __future__ import annotations

import torch


def correlated(width: int, seed: int = 0, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """X^T X / T f32 [width, width] of 3 * width inputs that hang together, some loud, some dead."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(3 * width, width // 8 + 1, generator=generator)
    inputs = common @ torch.randn(width // 8 + 1, width, generator=generator) + torch.randn(3 * width, width, generator=generator)
    inputs *= torch.rand(width, generator=generator) * 2 + 0.2
    inputs[:, list(dead)] = 0
    return inputs.T @ inputs / len(inputs)
