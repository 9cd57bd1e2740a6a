"""What each of vLLM's parameters must hold, by the names in the checkpoint: fused, stacked and cut for a rank.

Written from vLLM's model files (model_executor/models/ernie45_moe.py, ernie45_vl.py, ernie45_vl_moe.py, ernie_mtp.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# how a rank's share is cut, by the last two names of a parameter; all else is whole on every rank
BY_ROWS = re.compile(
    r"(embed_tokens|lm_head|[qkv]_proj|gate_proj|up_proj|fc1)\.\w+$|resampler_model\.(spatial_linear|temporal_linear)\.[02]\.\w+$"
    r"|resampler_model\.mlp\.\w+$"
)
BY_COLUMNS = re.compile(r"(o_proj|down_proj|attn\.proj|fc2)\.weight$")
EXPERTS = re.compile(r"(model\.layers\.\d+)\.mlp\.(|text_|vision_)experts\.routed_experts\.(w13|w2)_weight$")
# vLLM's names -> those of the file
RENAMED = (
    (r"^language_model\.", ""),
    (r"^resampler_model\.", "model.resampler_model."),
    (r"(spatial|temporal)_linear([12])\.", lambda m: f"{m[1]}_linear.{2 * int(m[2]) - 2}."),
    (r"(spatial|temporal)_norm\.", r"\1_linear.3."),
    (r"^model\.layers\.\d+\.(mtp_\w+)\.", r"model.\1.0."),
    (r"\.(?:text_|vision_)?experts\._shared_experts\._layer\.", ".shared_experts."),
    (r"\.(?:gate\.|\w*experts\.routed_experts\.)?e_score_correction_bias$", ".moe_statics.e_score_correction_bias"),
    (r"\.text_experts_gate\.weight$", ".gate.weight"),
    (r"\.vision_experts_gate\.weight$", ".gate.weight_1"),
)


class Rank:
    """The share of one rank in a plain checkpoint, and which of its tensors were asked for."""

    def __init__(self, plain: Tensors, rank: int, ranks: int, whole_experts: bool = False) -> None:
        self.plain, self.rank, self.ranks, self.whole_experts = plain, rank, ranks, whole_experts
        self.used: set[str] = set()

    def of(self, parameter: str) -> torch.Tensor:
        """The value of vLLM's parameter. Raises KeyError with the name that the file lacks."""
        if ".routed_experts.w" in parameter:
            return self._experts(parameter)
        name = parameter
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        module, _, part = name.rpartition(".")
        head, _, last = module.rpartition(".")
        if last in FUSED:
            return torch.cat([self._share(f"{head}.{one}.{part}") for one in FUSED[last]])
        if last == "qkv":  # of the vision tower, which the file holds fused
            return torch.cat([self._cut(third, 0) for third in self._stored(name).chunk(3)])
        value = self._share(name)
        if "_experts_gate" in parameter:
            return value.T  # the file has the routers of VL models as [hidden, experts]
        if "moe_statics" in name:
            return self._routing_bias(parameter, value)
        return value

    @staticmethod
    def _routing_bias(parameter: str, value: torch.Tensor) -> torch.Tensor:
        """[1, experts] in a text model's file; [2, experts], text and vision, in that of a VL model."""
        if "vision_experts" in parameter:
            return value[1]
        return value if parameter.endswith(".mlp.e_score_correction_bias") else value[0]

    def _experts(self, parameter: str) -> torch.Tensor:
        """`….experts.routed_experts.w13_weight`: [experts, gate and up, hidden] of the experts of one kind."""
        found = EXPERTS.search(parameter)
        if found is None:
            raise KeyError(parameter)
        layer, kind, stacked = found.groups()
        numbers = self._numbers(f"{layer}.mlp.experts.", kind)
        projections = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}[stacked]
        names = [[f"{layer}.mlp.experts.{n}.{projection}.weight" for projection in projections] for n in numbers]
        if self.whole_experts:  # the first ranks have the first
            each = len(names) // self.ranks
            names = names[self.rank * each : (self.rank + 1) * each]
        share = self._stored if self.whole_experts else self._share
        return torch.stack([torch.cat([share(name) for name in of_one]) for of_one in names])

    def _numbers(self, prefix: str, kind: str) -> range:
        """Of a VL model's experts the first half is for text, the second for vision."""
        experts = 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in self.plain if name.startswith(prefix))
        return {"": range(experts), "text_": range(experts // 2), "vision_": range(experts // 2, experts)}[kind]

    def _stored(self, name: str) -> torch.Tensor:
        if name == "lm_head.weight" and name not in self.plain:
            name = "model.embed_tokens.weight"  # a tied head
        self.used.add(name)
        return self.plain[name]

    def _share(self, name: str) -> torch.Tensor:
        value = self._stored(name)
        if BY_COLUMNS.search(name):
            return self._cut(value, 1)
        return self._cut(value, 0) if BY_ROWS.search(name) else value

    def _cut(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.chunk(self.ranks, axis)[self.rank]
