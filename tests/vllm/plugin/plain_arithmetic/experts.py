"""Routed experts: integers, MXFP4, NVFP4, float8 blocks of both forms, plain ones; WINT2 has its own plug-in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from plain_arithmetic import decode
from plain_arithmetic.linears import become_plain

W13, W2 = "w13", "w2"  # gate and up in one [experts, 2 * width, hidden]; down [experts, hidden, width]


def products(
    self: Any, layer: nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *rest: Any, **more: Any
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) of each chosen expert, weighted and added in float32, one expert after the other."""
    total = torch.zeros_like(x, dtype=torch.float32)
    if layer.expert_map is not None:  # whole experts on each rank; -1 is one of another
        topk_ids = layer.expert_map[topk_ids.long()]
    for expert in (number for number in topk_ids.unique().tolist() if number >= 0):
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], layer.w13_weight[expert]).float().chunk(2, -1)
        out = F.linear((F.silu(gate) * up).to(x.dtype), layer.w2_weight[expert])
        total.index_add_(0, token, out.float() * topk_weights[token, choice, None].float())
    return total.to(x.dtype)


def replace() -> None:
    """Each method's choice of a backend, its packing after loading and its products."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as plain
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_mxfp4 as ct_mxfp4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as ct_float4,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a8_fp8 as ct_integers_float8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_fp8 as ct_float8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as ct_integers,
    )

    # names of the backends that GPUs would get; they decide about the parameters' shapes
    ct_integers.select_wna16_moe_backend = lambda **kwargs: (ct_integers.WNA16MoEBackend.MARLIN, None)
    ct_integers.check_moe_marlin_supports_config = lambda *args, **kwargs: True
    ct_float4.select_nvfp4_moe_backend = lambda **kwargs: (None, None)
    ct_float4.is_global_sf_supported_for_nvfp4_backend = lambda backend: False
    fp8.select_fp8_moe_backend = ct_float8.select_fp8_moe_backend = lambda **kwargs: (None, None)
    ct_integers_float8.select_w4a8_moe_backend = lambda **kwargs: (None, None)
    _compute_plainly(ct_integers.CompressedTensorsWNA16MoEMethod, _decode_integers)
    _compute_plainly(ct_float4.CompressedTensorsW4A4Nvfp4MoEMethod, _decode_float4)
    _compute_plainly(ct_integers_float8.CompressedTensorsW4A8Fp8MoEMethod, _decode_integers)
    _compute_plainly(ct_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod, _decode_mxfp4)
    _compute_plainly(ct_float8.CompressedTensorsW8A8Fp8MoEMethod, _decode_float8)
    _compute_plainly(fp8.Fp8MoEMethod, _decode_float8)
    _compute_plainly(plain.UnquantizedFusedMoEMethod, lambda self, layer: None)


def _compute_plainly(method: Any, after_loading: Any) -> None:
    method.process_weights_after_loading = after_loading
    method.apply = products
    method.is_monolithic = property(lambda self: False)  # False: vLLM routes, and passes topk_ids
    method.get_fused_moe_quant_config = lambda self, layer: None


def _decode_integers(self: Any, layer: nn.Module) -> None:
    """`wN_weight_packed` and `wN_weight_scale` to `wN_weight`."""
    columns = {W13: layer.hidden_size, W2: layer.intermediate_size_per_partition}
    decoded = {
        f"{w}_weight": decode.integers(
            getattr(layer, f"{w}_weight_packed"), getattr(layer, f"{w}_weight_scale"), self.num_bits, columns[w]
        )
        for w in (W13, W2)
    }
    become_plain(layer, decoded, tuple(f"{w}_weight_{part}" for w in (W13, W2) for part in ("packed", "scale", "shape")))


def _decode_float4(self: Any, layer: nn.Module) -> None:
    """`wN_weight_packed`, its scales, and as vLLM has it the global scale of gate for up too; a divisor."""
    of_all = {W13: layer.w13_weight_global_scale[:, 0], W2: layer.w2_weight_global_scale}
    decoded = {
        f"{w}_weight": decode.float4(getattr(layer, f"{w}_weight_packed"), getattr(layer, f"{w}_weight_scale"), 1 / of_all[w])
        for w in (W13, W2)
    }
    inputs = [getattr(layer, f"{w}_input_global_scale") for w in (W13, W2)]
    if not self.use_a16 and not all(bool(((scale > 0) & scale.isfinite()).all()) for scale in inputs):
        raise ValueError("a scale of inputs that was not loaded")
    parts = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    become_plain(layer, decoded, tuple(f"{w}_{part}" for w in (W13, W2) for part in parts))


def _decode_mxfp4(self: Any, layer: nn.Module) -> None:
    """`wN_weight_packed` and `wN_weight_scale` to `wN_weight`."""
    decoded = {
        f"{w}_weight": decode.mxfp4(getattr(layer, f"{w}_weight_packed"), getattr(layer, f"{w}_weight_scale")) for w in (W13, W2)
    }
    become_plain(layer, decoded, tuple(f"{w}_weight_{part}" for w in (W13, W2) for part in ("packed", "scale")))


def _decode_float8(self: Any, layer: nn.Module) -> None:
    """`wN_weight` in float8 and its scales to `wN_weight` in bf16."""
    part = "weight_scale_inv" if "w13_weight_scale_inv" in layer._parameters else "weight_scale"
    high, wide = layer.weight_block_size
    if high != wide:
        raise ValueError(f"blocks of {high} x {wide}")
    decoded = {
        f"{w}_weight": decode.blocks(getattr(layer, f"{w}_weight"), getattr(layer, f"{w}_{part}"), high) for w in (W13, W2)
    }
    become_plain(layer, decoded, tuple(f"{w}_{part}" for w in (W13, W2)))
