"""Two streams of hidden states through the layers: what the original model computes, and what the quantized one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Streams:
    """Residuals f32 [windows, tokens, H] before a layer; one tensor twice where nothing has been changed yet.

    The first `fit` windows are to fit to, the others to judge by.
    """

    original: torch.Tensor
    made: torch.Tensor
    fit: int

    @property
    def same(self) -> bool:
        """Has nothing been changed?"""
        return self.original is self.made

    @property
    def fit_tokens(self) -> int:
        """How many of [windows * tokens] are to fit to."""
        return self.fit * self.original.shape[1]

    def drift(self) -> float:
        """Energy of the difference over that of the original, mean over the tokens for judging."""
        if self.same:
            return 0.0
        original, made = self.original[self.fit :].flatten(0, 1), self.made[self.fit :].flatten(0, 1)
        return float(((original - made).pow(2).sum(1) / original.pow(2).sum(1).clamp(min=1e-30)).mean())


def weights_of(residual: torch.Tensor) -> torch.Tensor:
    """How much a token counts: 1 / mean(a^2) of its residual [n, H], for what comes after divides by that (RMS norm)."""
    return 1 / residual.pow(2).mean(1).clamp(min=1e-30)


def between(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Weights of tokens for what is added to a residual: those of the residual before it where it grows little.

    Some layers make a window's first token a thousand times as large. By the weights before, that token would decide every
    fit; by those after, it would be lost, and all others attend to it.
    """
    import torch

    return torch.minimum(before, (before * after).sqrt())
