"""The weight as it is, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import ITEMSIZE, TensorSpec

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


@dataclass(frozen=True)
class Keep:
    """Nothing is changed; any shape and dtype will do."""

    rows = 1
    version = 1

    def describe(self) -> str:
        """For people."""
        return "kept"

    def problem(self, spec: TensorSpec) -> str | None:
        """Nothing cannot be kept."""
        return None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The weight itself."""
        return {"weight": spec}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """Those of its dtype."""
        return 8.0 * ITEMSIZE[spec.dtype]

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The weight itself."""
        return {"weight": weight}

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The weight itself."""
        return encoded["weight"]

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """The weight itself."""
        return {"weight": weight}


CODEC = Keep
EXAMPLES = (Keep(),)
KEEP = Keep()
