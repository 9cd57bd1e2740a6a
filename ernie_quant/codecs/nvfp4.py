"""NVFP4: float4 (e2m1) in groups of 16 inputs that share a scale in float8 (e4m3), and a number for all scales of a weight.

w ~ code * scale / global_scale; codes are those of mxfp4. global_scale is the largest power of two for which the largest |w|
of the weight, and of those with which it shares global_scale, comes to no more than 6 x 448: what a program makes of it is
exact then, and so is the decoded weight in bf16. (compressed-tensors takes 6 x 448 / max|w| itself; any number is read.)

The scale that puts the largest |w| of a group at 6 is seldom the best: several of its neighbours are tried, and of those
that put it at 4, and the one with the least squared error is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import LARGEST_WEIGHT, Measured
from ernie_quant.codecs._largest import magnitude
from ernie_quant.measure import Difference

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded, Encoder

GROUP = 16
MOST = 6.0 * 448.0  # code x scale
UNKNOWN = 1.0  # the largest weight where nobody says it: a slab of rows does not show it
# beyond these the scales, their inverses or the decoded weights would leave what float32 and bf16 hold exactly
LEAST_EXPONENT, MOST_EXPONENT = -116, 116


@dataclass(frozen=True)
class NvFloat4(Measured):
    """It has no options: group and scales are those of the hardware."""

    rows = 1
    rate = 114.0
    version = 1
    decodes_to = "BF16"
    needs: ClassVar[tuple[str, ...]] = (LARGEST_WEIGHT,)

    @property
    def form(self) -> str:
        """Name and group."""
        return f"nvfp4, group {GROUP}"

    def describe(self) -> str:
        """For people."""
        return self.form

    def problem(self, spec: TensorSpec) -> str | None:
        """A group must divide the inputs: no runtime loads ragged ones."""
        width = spec.shape[1]
        return f"groups of {GROUP} do not divide {width} inputs; int4 or int8 per channel would" if width % GROUP else None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes uint8 [out, in], one in each byte; scale uint8 [out, in / 16], the bits of e4m3; once global_scale F32 [1]."""
        out, width = spec.shape
        return {
            "codes": TensorSpec((out, width), "U8"),
            "scale": TensorSpec((out, width // GROUP), "U8"),
            "global_scale": TensorSpec((1,), "F32"),
        }

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """4, 8 for the scale of each group, and 32."""
        return ((4 + 8 / GROUP) * spec.numel + 32) / spec.numel

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """With `largest_weight` f32 [1] the global scale. Raises ErnieQuantError where it is missing or no magnitude."""
        return Scaled(self, self._once(statistics)) if statistics else None

    def _once(self, statistics: Encoded) -> Encoded:
        largest = magnitude(statistics, LARGEST_WEIGHT, "nvfp4", "the scale of all scales")
        return {"global_scale": largest.new_tensor([global_scale(float(largest))])}

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of a weight [out, in] of any float dtype, inputs a multiple of 16, as if its largest were 1."""
        return self.measured(weight)[0]

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """`encode`, and what the kernel saw being lost."""
        return self.at(weight, global_scale(UNKNOWN))

    def at(self, weight: torch.Tensor, scale_of_all: float) -> tuple[Encoded, Difference]:
        """Codes and scales for this global scale, a power of two, and what they lose."""
        codes, scale, sums = kernels.of("nvfp4", weight).encode(weight, scale_of_all)
        return {"codes": codes, "scale": scale}, Difference(*sums)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in]."""
        codes = encoded["codes"]
        weight: torch.Tensor = kernels.of("nvfp4", codes).decode(codes, encoded["scale"], _of_all(encoded))
        return weight

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """Codes of weight / scale, rounded."""
        return encoded | {"codes": kernels.of("nvfp4", weight).codes(weight, encoded["scale"], _of_all(encoded))}


@dataclass(frozen=True)
class Scaled:
    """Encodes rows of a weight whose global scale is known."""

    codec: NvFloat4
    once: Encoded

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of rows [rows, in]."""
        return self.measured(weight)[0]

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """`encode`, and what the kernel saw being lost."""
        return self.codec.at(weight, float(self.once["global_scale"]))


def global_scale(largest: float) -> float:
    """The largest power of two that brings `largest` to no more than 6 x 448; 1 for a weight of zeros."""
    if not largest:
        return 1.0
    _, exponent = math.frexp(MOST / largest)  # 2**(exponent - 1) <= it
    return math.ldexp(1.0, min(max(exponent - 1, LEAST_EXPONENT), MOST_EXPONENT))


def _of_all(encoded: Encoded) -> torch.Tensor:
    """f32 [1] on the device of the scales; what `encode` took where no encoder has made it."""
    import torch

    device = encoded["scale"].device
    known = encoded["global_scale"] if "global_scale" in encoded else torch.tensor([global_scale(UNKNOWN)])
    return known.to(device)


CODEC = NvFloat4
EXAMPLES = (NvFloat4(),)
