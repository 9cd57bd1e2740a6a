"""Second moments of inputs that do not exist."""

from __future__ import annotations

import torch

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec


def correlated(width: int, seed: int = 0, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """X^T X / T f32 [width, width] of 3 * width inputs that hang together, some loud, some dead."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(3 * width, width // 8 + 1, generator=generator)
    inputs = common @ torch.randn(width // 8 + 1, width, generator=generator) + torch.randn(3 * width, width, generator=generator)
    inputs *= torch.rand(width, generator=generator) * 2 + 0.2
    inputs[:, list(dead)] = 0
    return inputs.T @ inputs / len(inputs)


def statistics_of(codec: Codec, spec: TensorSpec) -> dict[str, torch.Tensor]:
    """Of inputs that do not exist: second moments, and whatever the codec cannot do without."""
    of_rows = codec.encode(torch.zeros(spec.shape)).keys()
    shapes = [field.shape for name, field in codec.specs(spec).items() if name not in of_rows]
    generator = torch.Generator().manual_seed(6)
    needed = {name: torch.rand(shape, generator=generator) + 0.5 for name, shape in zip(codec.needs, shapes, strict=True)}
    return {"hessian": correlated(spec.shape[1]), **needed}


def once_of(codec: Codec, spec: TensorSpec) -> dict[str, torch.Tensor]:
    """What is stored of statistics alone."""
    encoder = codec.prepare(spec, statistics_of(codec, spec)) if codec.needs else None
    return encoder.once if encoder else {}
