"""NVFP4 for inputs in float4 too (W4A4): the weights of `nvfp4`, and the number by which the scales of inputs are multiplied.

A program gives every 16 inputs of a token an e4m3 scale of their own; that of the largest input of all comes to 448 by
activation_scale = 448 x 6 / max|x|, which is measured on text. Larger ones are cut off there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import LARGEST_WEIGHT
from ernie_quant.codecs._largest import LARGEST, magnitude
from ernie_quant.codecs.nvfp4 import GROUP, MOST, MOST_EXPONENT, NvFloat4

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


@dataclass(frozen=True)
class NvFloat4Inputs(NvFloat4):
    """It has no options."""

    version = 1
    needs: ClassVar[tuple[str, ...]] = (LARGEST_WEIGHT, LARGEST)
    ratios = (1.0,)  # groups have scales of their own: to cut off the largest would help no others
    inputs = "float4 activations"

    @property
    def form(self) -> str:
        """The weight's, and that of the inputs."""
        return f"{super().form}, fp4 inputs"

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Those of `nvfp4`, and once activation_scale F32 [1]."""
        return super().specs(spec) | {"activation_scale": TensorSpec((1,), "F32")}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """4, 8 for the scale of each group, and twice 32."""
        return ((4 + 8 / GROUP) * spec.numel + 64) / spec.numel

    def _once(self, statistics: Encoded) -> Encoded:
        """`largest` f32 [1] too. Inputs that are all zeros have 1: any scale codes them, and programs divide by it."""
        import torch

        largest = magnitude(statistics, LARGEST, "w4a4", "the scale of the activations")
        scale = (MOST / largest).clamp(max=2.0**MOST_EXPONENT)
        return super()._once(statistics) | {"activation_scale": torch.where(largest > 0, scale, 1.0)}

    def seen(self, inputs: torch.Tensor) -> torch.Tensor:
        """f32 [tokens, in]: what the kernel rounds of inputs [tokens, in], which it has in bf16."""
        return inputs.bfloat16().float()

    def rounded(self, inputs: torch.Tensor, activation_scale: torch.Tensor) -> torch.Tensor:
        """f32 [tokens, in]: the inputs as the kernel multiplies them.

        scale = e4m3(activation_scale max|x| / 6) for every 16 inputs of a token, code = e2m1(x activation_scale / scale),
        both to the nearest (vllm-project/vllm, csrc/quantization/fp4/nvfp4_utils.cuh, cvt_warp_fp16_to_fp4).
        """
        import torch

        from ernie_quant.kernels import float4_reference as float4

        seen = self.seen(inputs)
        x = seen.reshape(*seen.shape[:-1], -1, GROUP)
        of_all = activation_scale.float()
        ideal = (x.abs().amax(-1, keepdim=True) * (of_all / float4.LARGEST)).clamp(max=MOST / float4.LARGEST)
        scale = ideal.to(torch.float8_e4m3fn).float()
        ratio = torch.where(scale > 0, x * (of_all / scale), 0.0)
        values: torch.Tensor = float4.values(float4.nearest(ratio)) * (scale / of_all)
        return values.reshape(seen.shape)


CODEC = NvFloat4Inputs
EXAMPLES = (NvFloat4Inputs(),)
