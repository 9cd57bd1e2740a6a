"""4-bit integers for inputs in float8 (W4AFP8): the codes of `rtn` in groups of 128, with scales that are positive.

What is stored is `rtn` bits 4, group 128; config.json says of the inputs that the program rounds them to float8 (e4m3), token by
token. vLLM turns the bf16 scales of a row into float8 too, by the largest of them (vllm-project/vllm,
quantization/utils/quant_utils.py, convert_bf16_scales_to_fp8), which is neither in `decode` nor in what reports measure:
docs/formats.md has what it costs. Signed scales, with which `rtn` has 8% less error, go the same way there, but nobody has seen
them come through; so the largest |w| is put on code 7, as GPTQModel and llm-compressor do, and the search goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.rtn import GROUP_RATIOS, RoundToNearest
from ernie_quant.measure import Difference

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded
    from ernie_quant.kernels.curvature import Inputs
    from ernie_quant.kernels.rtn_feedback import Grid

BITS, GROUP, LARGEST = 4, 128, 7  # what vLLM's kernel has: 4 bits in groups of 128 (compressed_tensors_moe_w4a8_fp8.py)


@dataclass(frozen=True)
class Weight4Float8(RoundToNearest):
    """The options are those of `rtn`; bits, group and codes are the kernel's."""

    rows = 1
    version = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bits, self.group_size, self.full_range) != (BITS, GROUP, True):
            raise ValueError(f"fp8 inputs go with bits {BITS}, group_size {GROUP} and full_range true only")

    @property
    def form(self) -> str:
        """The weight's, and that of the inputs."""
        return f"{super().form}, fp8 inputs"

    def problem(self, spec: TensorSpec) -> str | None:
        """Groups of 128 must divide the inputs; there are no others for inputs in float8."""
        width = spec.shape[1]
        return f"groups of {GROUP}, the only ones for fp8 inputs, do not divide {width} inputs" if width % GROUP else None

    def _grid(self, group: int) -> Grid:
        return replace(super()._grid(group), divisor=LARGEST, signed=False)

    def _encode_with(self, weight: torch.Tensor, inputs: Inputs, grid: Grid, passes: int) -> Encoded:
        return _calm(super()._encode_with(weight, inputs, grid, passes))

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """Codes and scales, and what the kernel saw being lost."""
        import numpy as np
        import torch

        if self.scale == "absmax":
            encoded, lost = super().measured(weight)
            return _calm(encoded), lost
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        codes, scale, sums = kernels.of("rtn", weight).encode(
            weight, GROUP, -LARGEST - 1, LARGEST, LARGEST, np.array(GROUP_RATIOS, np.float32), 1, False
        )
        return _calm({"codes": codes, "scale": scale}), Difference(*sums)


def _calm(encoded: Encoded) -> Encoded:
    """Groups without a code that is not 0 have the least scale of the others of their row, where there are any."""
    import torch

    codes, scale = encoded["codes"], encoded["scale"]
    empty = ~codes.reshape(*scale.shape, -1).any(-1)
    least = torch.where(empty, torch.inf, scale.float()).amin(1, keepdim=True)
    calm = torch.where(empty & least.isfinite(), least.to(scale.dtype), scale)
    return encoded | {"scale": calm}


CODEC = Weight4Float8
EXAMPLES = (Weight4Float8(), Weight4Float8(scale="absmax"), Weight4Float8(method="descent"))
