"""vLLM's method for WINT2 experts: parameters as they are stored, a loader that loses nothing, and the product.

vllm-project/vllm, model_executor/layers/fused_moe/fused_moe_method_base.py and routed_experts.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.ccq import IN_MULTIPLE
from ernie_quant.dtypes import torch_dtype
from ernie_quant.errors import ConfigError, ErnieQuantError
from ernie_quant.runtimes import _wint2
from ernie_quant.serving import experts
from ernie_quant.serving.vllm_loading import Loading

# how vLLM's loader cuts a tensor for a rank: as the weight, or rows alone
CUT = {_wint2.PACKED: "group", _wint2.LOCAL: "group", _wint2.CHANNEL: "channel"}
GATE_UP, DOWN = "w13", "w2"
TRITON = find_spec("triton") is not None


class Wint2Experts(FusedMoEMethodBase):  # type: ignore[misc]
    """Of one layer's routed experts, whose name is `layer_name`."""

    def __init__(self, moe: Any, layer_name: str) -> None:
        """Raises ErnieQuantError for what is not served."""
        super().__init__(moe)
        self.layer_name = layer_name
        for refused, why in self._refused(moe):
            if refused:
                raise ErnieQuantError(f"{layer_name}: {why}")

    @staticmethod
    def _refused(moe: Any) -> list[tuple[bool, str]]:
        shared = moe.moe_parallel_config
        return [
            (
                not (current_platform.is_cuda() or current_platform.is_cpu()),
                f"WINT2 experts are served on NVIDIA GPUs and on CPUs, not on {current_platform.device_name}",
            ),
            (shared.enable_eplb, "WINT2 experts do not move between ranks: leave --enable-eplb out"),
            (
                shared.dp_size > 1 or shared.is_sequence_parallel,
                "WINT2 experts were not tried with data or sequence parallelism: use --tensor-parallel-size alone",
            ),
            (
                moe.activation.value != "silu" or moe.has_bias,
                f"activation {moe.activation.value}, biases: {moe.has_bias}; not ERNIE's",
            ),
        ]

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Any,
        **attributes: Any,
    ) -> None:
        """`w13_weight_packed` [experts, 2 I, H/4] and so on. Raises ConfigError for widths that WINT2 cannot be cut to."""
        width = intermediate_size_per_partition
        ranks = self.moe.moe_parallel_config.tp_size
        if width % IN_MULTIPLE or hidden_size % IN_MULTIPLE:
            raise ConfigError(
                f"{self.layer_name}: WINT2 needs multiples of {IN_MULTIPLE} inputs, and a rank of {ranks} has {width} of"
                f" {width * ranks} in down_proj, {hidden_size} in gate_proj: use a smaller --tensor-parallel-size, or"
                " --enable-expert-parallel"
            )
        self.loading = Loading(self.layer_name, weight_loader, hidden_size, width * ranks)
        for prefix, shape in ((GATE_UP, (2 * width, hidden_size)), (DOWN, (hidden_size, width))):
            for name, part in _wint2.parts(prefix, TensorSpec(shape, "BF16")).items():
                kind = name.removeprefix(f"{prefix}.")
                blank = float("nan") if kind == _wint2.CHANNEL else 0
                empty = torch.full((num_experts, *part.spec.shape), blank, dtype=torch_dtype(part.spec.dtype))
                parameter = torch.nn.Parameter(empty, requires_grad=False)
                layer.register_parameter(f"{prefix}_{kind}", parameter)
                cut = {"is_transposed": False, "quant_method": CUT[kind], "weight_loader": self.loading.load}
                set_weight_attrs(parameter, {**attributes, **cut})

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is changed. Raises CheckpointError where a tensor did not come."""
        channels = [getattr(layer, f"{prefix}_{_wint2.CHANNEL}") for prefix in (GATE_UP, DOWN)]
        self.loading.check(len(channels[0]), any(bool(channel.isnan().any()) for channel in channels))

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: vLLM's own kernels take no part. Raises ErnieQuantError where LoRA does (vllm/lora/layers/fused_moe.py)."""
        if layer.lora_base_layer_prefix:
            raise ErnieQuantError(f"{self.layer_name}: WINT2 experts take no LoRA")

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """[T, H] of [T, H]: what this rank's experts and share of their widths add."""
        gate_up, down = (experts.Stored(*(getattr(layer, f"{prefix}_{kind}") for kind in CUT)) for prefix in (GATE_UP, DOWN))
        if x.device.type == "cuda" and TRITON:
            return _on_gpu(layer, x, gate_up, down, topk_weights, topk_ids)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        found: torch.Tensor = _one_by_one(x, list(gate_up), list(down), topk_weights, topk_ids)
        return found


def _products(
    x: torch.Tensor, gate_up: list[torch.Tensor], down: list[torch.Tensor], topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    return experts.products(x, experts.Stored(*gate_up), experts.Stored(*down), topk_weights, topk_ids)


# On a CPU vLLM compiles what it calls here (runner/moe_runner.py, _select_forward); this is nothing that torch could compile
_SCHEMA = "(Tensor x, Tensor[] gate_up, Tensor[] down, Tensor topk_weights, Tensor topk_ids) -> Tensor"
_one_by_one: Any = torch.library.custom_op("ernie_quant::wint2_experts", _products, mutates_args=(), schema=_SCHEMA)
_one_by_one.register_fake(lambda x, gate_up, down, topk_weights, topk_ids: torch.empty_like(x))


def _on_gpu(
    layer: Any,
    x: torch.Tensor,
    gate_up: experts.Stored,
    down: experts.Stored,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    from ernie_quant.serving import experts_triton

    def align(ids: torch.Tensor, block: int) -> Any:
        return moe_align_block_size(ids, block, layer.global_num_experts, layer.expert_map)

    return experts_triton.products(x, gate_up, down, topk_weights, topk_ids, align, layer.expert_map)
