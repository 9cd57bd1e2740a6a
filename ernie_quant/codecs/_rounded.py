"""A weight that is kept, but for its dtype: the nearest values of another one. A runtime wants it so, or a type of GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import Keep
from ernie_quant.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

# how reports call it
ROUNDED = {"BF16": "kept, rounded to bfloat16", "F16": "kept, rounded to float16", "F32": "kept, as float32"}


@dataclass(frozen=True)
class Rounded(Keep):
    """Stored as a kept weight is, in a file that does not show what it was."""

    dtype: str = "BF16"

    def describe(self) -> str:
        """For people."""
        return ROUNDED[self.dtype]

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The weight in the other dtype."""
        return {"weight": TensorSpec(spec.shape, self.dtype)}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """Those of the other dtype."""
        return super().bits_per_weight(self.specs(spec)["weight"])

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Ties go to the even one; what float16 cannot hold becomes its largest number."""
        return {"weight": rounded(weight, torch_dtype(self.dtype))}


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `weight` in `dtype`; NaN and infinity stay what they are."""
    import torch

    if dtype == torch.float16 and weight.dtype != dtype:
        most = torch.finfo(dtype).max
        weight = torch.where(weight.isfinite(), weight.clamp(-most, most), weight)
    return weight.to(dtype)
