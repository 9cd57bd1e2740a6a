"""The weight as it is, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import DataFree
from ernie_quant.dtypes import ITEMSIZE

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


KEPT = "kept"  # how reports call it


@dataclass(frozen=True)
class Keep(DataFree):
    """Nothing is changed; any shape and dtype will do."""

    rows = 1
    version = 1

    @property
    def form(self) -> str:
        """Of every kept weight the same."""
        return KEPT

    def describe(self) -> str:
        """For people."""
        return KEPT

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
