"""quantization_config of a checkpoint with WINT2 experts: which layers they are; all others are compressed-tensors' or plain."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from ernie_quant.errors import ConfigError
from ernie_quant.runtimes import _wint2
from ernie_quant.serving.vllm_method import Wint2Experts

MIN_CAPABILITY = 80  # bf16 in tensor cores


class Wint2Config(CompressedTensorsConfig):  # type: ignore[misc]
    """compressed-tensors', with a list of patterns for experts that are WINT2."""

    targets: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Wint2Config:
        """Raises ConfigError for what `_wint2` does not know."""
        targets = tuple(_wint2.targets_of(config))
        made: Wint2Config = super().from_config({key: value for key, value in config.items() if key != _wint2.KEY})
        made.targets = targets
        return made

    def get_name(self) -> str:
        """quant_method."""
        return _wint2.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What ERNIE computes in; vLLM names the method where another is asked for."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU, as 10 times its compute capability."""
        return MIN_CAPABILITY

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer with vLLM's name `prefix` is loaded and computed."""
        if isinstance(layer, RoutedExperts) and self._is_wint2(layer, prefix):
            return Wint2Experts(layer.moe_config, prefix)
        return super().get_quant_method(layer, prefix)

    def _is_wint2(self, layer: Any, prefix: str) -> bool:
        """By the first expert, as vLLM looks up compressed-tensors' groups (compressed_tensors_moe.py, get_moe_method)."""
        asked = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        found = {f"{prefix}.0.{name}": self._matches(f"{prefix}.0.{name}") for name in asked}
        if len(set(found.values())) > 1:
            one = {answer: name for name, answer in found.items()}
            raise ConfigError(f"config.json: {_wint2.KEY}.targets has {one[True]} but not {one[False]}; vLLM fuses the two")
        return any(found.values())

    def _matches(self, name: str) -> bool:
        return any(re.match(t.removeprefix("re:"), name) if t.startswith("re:") else t == name for t in self.targets)
