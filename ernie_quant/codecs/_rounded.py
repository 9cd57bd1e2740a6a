"""A weight that is kept, but for its dtype: bfloat16, the nearest values. No recipe asks for it, a runtime does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import Keep

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

DTYPE = "BF16"
ROUNDED = "kept, rounded to bfloat16"  # how reports call it


@dataclass(frozen=True)
class Rounded(Keep):
    """Stored as a kept weight is, in a file that does not show what it was."""

    def describe(self) -> str:
        """For people."""
        return ROUNDED

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The weight in bfloat16."""
        return {"weight": TensorSpec(spec.shape, DTYPE)}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """Those of bfloat16."""
        return super().bits_per_weight(self.specs(spec)["weight"])

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Ties go to the even one."""
        import torch

        return {"weight": weight.to(torch.bfloat16)}
