"""Linears: integers, MXFP4, NVFP4, both forms of float8 blocks, and those that are not quantized."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from plain_arithmetic import decode

INTEGER_PARAMETERS = ("weight_packed", "weight_scale", "weight_shape")


def product(layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The one product of all linears. A weight in another dtype (a float32 router) takes its input as it comes."""
    return F.linear(x, layer.weight, bias)


def become_plain(layer: nn.Module, decoded: dict[str, torch.Tensor], dropped: tuple[str, ...]) -> None:
    """Plain parameters in the place of those that were loaded."""
    for name in (*dropped, *decoded):
        if name in layer._parameters:
            del layer._parameters[name]
    for name, value in decoded.items():
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def replace() -> None:
    """vLLM asks for a kernel in a place for each kind of form."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_mxfp4 as ct_mxfp4
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4 as ct_float4
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a8_fp8 as ct_w4afp8
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8 as ct_float8
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as ct_integers

    class Integers(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            columns, bits = self.config.partition_weight_shape[0], self.config.weight_type.size_bits
            weight = decode.integers(getattr(layer, self.w_q_name), getattr(layer, self.w_s_name), bits, columns)
            become_plain(layer, {"weight": weight}, INTEGER_PARAMETERS)

        def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return product(layer, x, bias)

    ct_float4.init_nvfp4_linear_kernel = lambda **kwargs: Float4()
    ct_float4.expose_input_quant_key = lambda *args: None
    ct_integers.choose_mp_linear_kernel = ct_w4afp8.choose_mp_linear_kernel = lambda *args, **kwargs: Integers
    # as on Hopper, which alone multiplies int4 with float8
    CompressedTensorsConfig._is_fp8_w4a8_sm90 = staticmethod(CompressedTensorsConfig._is_fp8_w4a8)
    ct_mxfp4.init_mxfp4_linear_kernel = lambda **kwargs: Mxfp4()
    fp8.init_fp8_linear_kernel = ct_float8.init_fp8_linear_kernel = lambda **kwargs: Float8Blocks()
    ct_float8.expose_input_quant_key = lambda *args: None  # it would ask for inputs that are quantized before they come
    UnquantizedLinearMethod.process_weights_after_loading = lambda self, layer: None
    UnquantizedLinearMethod.apply = lambda self, layer, x, bias=None: product(layer, x, bias)


class Float4:
    """The kernel of NVFP4; vLLM has made one number of those of all parts, and turned it into a factor."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = decode.float4(layer.weight, layer.weight_scale, layer.weight_global_scale)
        if (inputs := getattr(layer, "input_global_scale", None)) is not None and not 0 < float(inputs) < float("inf"):
            raise ValueError(f"the scale of the inputs is {float(inputs)}")
        numbers = ("weight_global_scale", "input_global_scale", "input_global_scale_inv", "alpha")
        become_plain(layer, {"weight": weight}, ("weight_scale", *numbers))

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Without quantizing the input."""
        return product(layer, x, bias)


class Mxfp4:
    """The kernel of `mxfp4-pack-quantized`, for which `weight_packed` has become `weight`."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Decode."""
        become_plain(layer, {"weight": decode.mxfp4(layer.weight, layer.weight_scale)}, ("weight_scale",))

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Without quantizing the input."""
        return product(layer, x, bias)


class Float8Blocks:
    """The kernel of `quant_method: fp8` (`weight_scale_inv`) and of compressed-tensors `float-quantized` (`weight_scale`)."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Decode by blocks; nothing else is written by this tool."""
        stored = "weight_scale_inv" if "weight_scale_inv" in layer._parameters else "weight_scale"
        high, wide = layer.weight_block_size
        if high != wide:
            raise ValueError(f"blocks of {high} x {wide}")
        weight = decode.blocks(layer.weight, getattr(layer, stored), high)
        become_plain(layer, {"weight": weight}, (stored,))

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Without quantizing the input; a router that became float8 by mistake shall run, and be found by its weight."""
        return product(layer, x.to(layer.weight.dtype), bias)
