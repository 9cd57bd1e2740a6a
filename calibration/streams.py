"""Two streams of hidden states through the layers: what the original model computes, and what the quantized one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.calibration.layer import rms_norm

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Streams:
    """Residuals f32 [windows, tokens, H] before a layer; one tensor twice where nothing has been changed yet.

    `judged`: bool [windows], those that take no part in a fit.
    """

    original: torch.Tensor
    made: torch.Tensor
    judged: torch.Tensor

    @property
    def same(self) -> bool:
        """Has nothing been changed?"""
        return self.original is self.made

    @property
    def judged_tokens(self) -> torch.Tensor:
        """bool [windows * tokens]."""
        return self.judged.repeat_interleave(self.original.shape[1])

    def drift(self) -> float:
        """Energy of the difference over that of the original, mean over the tokens for judging."""
        if self.same:
            return 0.0
        some = self.judged if bool(self.judged.any()) else ~self.judged
        original, made = self.original[some].flatten(0, 1), self.made[some].flatten(0, 1)
        return float(((original - made).pow(2).sum(1) / original.pow(2).sum(1).clamp(min=1e-30)).mean())


def weights_of(residual: torch.Tensor) -> torch.Tensor:
    """How much a token counts: 1 / mean(a^2) of its residual [n, H], for what comes after divides by that (RMS norm)."""
    return 1 / residual.pow(2).mean(1).clamp(min=1e-30)


def normed(residual: torch.Tensor, gains: torch.Tensor, eps: float) -> torch.Tensor:
    """Of [n, H]."""
    return rms_norm(residual, gains, eps)
