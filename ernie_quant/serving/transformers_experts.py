"""Experts of a layer whose weights stay in memory as they are stored: each is decoded when it is needed, and forgotten.

It stands in the place of transformers' Ernie4_5_MoeExperts or Ernie4_5_VLMoeMoeExperts (modeling_ernie4_5_moe.py), and does the
arithmetic of its plain ("eager") forward in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ernie_quant.dtypes import torch_dtype
from ernie_quant.serving.transformers_held import Group
from ernie_quant.weights.stored import Stored

PROJECTIONS = ("gate_up_proj", "down_proj")
Parts = Mapping[str, torch.Tensor]  # stored tensors of a weight, by name


class PackedExperts(nn.Module):
    """Per projection and part of its weights a parameter uint8 [experts, gate and up or down, bytes of the part].

    Bytes, whatever they hold: a model that is cast to another dtype must not cast scales. The first part has the name of
    transformers' parameter, by which its loader goes; the others' names are added to it.
    """

    def __init__(self, experts: nn.Module, groups: Mapping[str, Sequence[Group]]) -> None:
        """For transformers' module, with the weights of both projections."""
        super().__init__()
        self.num_experts: Any = experts.num_experts
        self.act_fn: Any = experts.act_fn
        self.alike = {name: groups[name][0] for name in PROJECTIONS}  # of the other experts the same but for their names
        for name, group in self.alike.items():
            for suffix, part in zip(suffixes(group[0]), group[0].expected.values(), strict=True):
                empty = torch.empty(len(groups[name]), len(group), part.spec.nbytes, dtype=torch.uint8)
                self.register_parameter(name + suffix, nn.Parameter(empty, requires_grad=False))

    def weight(self, name: str, expert: int) -> torch.Tensor:
        """Of a projection and an expert, decoded: [out, in], up below gate."""
        return torch.cat([self._decoded(name, expert, place, stored) for place, stored in enumerate(self.alike[name])])

    def _decoded(self, name: str, expert: int, place: int, stored: Stored) -> torch.Tensor:
        parts = {
            part: getattr(self, name + suffix)[expert, place].view(torch_dtype(expected.spec.dtype)).view(expected.spec.shape)
            for suffix, (part, expected) in zip(suffixes(stored), stored.expected.items(), strict=True)
        }
        return stored.codec.decode(stored.target.unpack(stored.name, stored.codec, parts))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[tokens, H] of [tokens, H] and of the experts that each token goes to, [tokens, k] numbers and weights."""
        out = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            if expert >= self.num_experts:  # what other processes have
                continue
            place, token = torch.where((top_k_index == expert).T)
            inputs, (gate_up, down) = hidden_states[token], (self.weight(name, expert).to(out.dtype) for name in PROJECTIONS)
            gate, up = nn.functional.linear(inputs, gate_up).chunk(2, dim=-1)
            found = nn.functional.linear(self.act_fn(gate) * up, down)
            out.index_add_(0, token, (found * top_k_weights[token, place, None]).to(out.dtype))
        return out


def suffixes(stored: Stored) -> Iterator[str]:
    """What is added to the name of a projection for each part of a weight."""
    yield ""
    for name in list(stored.expected)[1:]:
        yield f"_{name.rpartition('.')[2]}"


def packed(groups: Sequence[Group], parts: Sequence[Sequence[Parts]]) -> dict[str, torch.Tensor]:
    """The parameters of a projection, by those suffixes, of the parts [experts][gate and up, or down]."""
    of_each: list[list[tuple[torch.Tensor, ...]]] = [[tuple(weight.values()) for weight in expert] for expert in parts]
    return {
        suffix: torch.stack([torch.stack([_bytes(weight[number]) for weight in expert]) for expert in of_each])
        for number, suffix in enumerate(suffixes(groups[0][0]))
    }


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def is_experts(module: nn.Module) -> bool:
    """Is it transformers' module for the experts of a layer?"""
    return hasattr(module, "num_experts") and all(isinstance(getattr(module, name, None), nn.Parameter) for name in PROJECTIONS)
