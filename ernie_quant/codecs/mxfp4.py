"""MXFP4: float4 (e2m1) in groups of 32 inputs that share a power of two (OCP Microscaling Formats 1.0).

w ~ code * 2**(v - 127); codes are 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, v is a byte (e8m0). The specification
takes v from the largest |w|, floor(log2 max|w|) - 2; here that exponent, the one below and the one above are tried, and the
one with the least squared error is stored. A group of zeros has v = 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import DataFree
from ernie_quant.measure import Difference

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

GROUP = 32


@dataclass(frozen=True)
class Float4Group(DataFree):
    """It has no options: group and scales are those of the specification."""

    rows = 1
    rate = 240.0
    version = 1

    @property
    def form(self) -> str:
        """Name and group."""
        return f"mxfp4, group {GROUP}"

    def describe(self) -> str:
        """For people."""
        return self.form

    def problem(self, spec: TensorSpec) -> str | None:
        """A group must divide the inputs: no runtime loads ragged ones."""
        width = spec.shape[1]
        return f"groups of {GROUP} do not divide {width} inputs; int4 or int8 per channel would" if width % GROUP else None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes uint8 [out, in], one in each byte, and scale uint8 [out, in / 32]."""
        out, width = spec.shape
        return {"codes": TensorSpec((out, width), "U8"), "scale": TensorSpec((out, width // GROUP), "U8")}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """4, and 8 for the scale of each group."""
        return 4 + 8 / GROUP

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of a weight [out, in] of any float dtype whose inputs are a multiple of 32."""
        return self.measured(weight)[0]

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """Codes and scales, and what the kernel saw being lost."""
        codes, scale, sums = kernels.of("mxfp4", weight).encode(weight)
        return {"codes": codes, "scale": scale}, Difference(*sums)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in]."""
        weight: torch.Tensor = kernels.of("mxfp4", encoded["codes"]).decode(encoded["codes"], encoded["scale"])
        return weight

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """Codes of weight / scale, rounded."""
        return encoded | {"codes": kernels.of("mxfp4", weight).codes(weight, encoded["scale"])}


CODEC = Float4Group
EXAMPLES = (Float4Group(),)
