"""The step of transformers' loading that decodes: stored tensors of the weights of a parameter -> the parameter.

huggingface/transformers, core_model_loading.py: a converter collects the tensors whose names match its patterns, in the order of
the experts' numbers, and gives each pattern's list to its operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

from ernie_quant.errors import CheckpointError
from ernie_quant.serving.transformers_experts import packed
from ernie_quant.serving.transformers_held import Group, Held, is_expert
from ernie_quant.weights.stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Queues = dict[tuple[str, str], Iterator[torch.Tensor]]  # (projection, part) -> tensors, in the order of the experts


class Decode(ConversionOps):
    """For converters that collect the parts of weights: it decodes, stacks experts, and puts gate before up.

    `origins`: the (projection, part) that each pattern of the converter stands for, without a projection for linear layers.
    `targets`: the parameters that are made; the first is the one that the converter is named after. transformers looks for
    `hf_quantizer` and then leaves the dtypes of what it collects as they are.
    """

    def __init__(self, hf_quantizer: Any, origins: Mapping[str, tuple[str, str]], targets: Sequence[str]) -> None:
        self.hf_quantizer, self.origins, self.targets = hf_quantizer, origins, targets

    def __deepcopy__(self, memo: object) -> Decode:
        """Itself: it remembers nothing, and transformers copies it for every parameter."""
        return self

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **others: object
    ) -> dict[str, torch.Tensor]:
        """The parameters, by what the converter calls them. Raises CheckpointError."""
        held: Held = self.hf_quantizer.held
        queues: Queues = {self.origins[pattern]: iter(tensors) for pattern, tensors in input_dict.items()}
        made: dict[str, torch.Tensor] = {}
        for target in self.targets:
            name = full_layer_name.replace(self.targets[0], target, 1)
            groups, dtype = held.of(name), model.get_parameter(name).dtype
            if not is_expert(groups[0][0]):
                made[target] = _weight(groups[0][0], queues).to(dtype)
            elif self.hf_quantizer.native and held.packed(name):
                parts = [[_taken(stored, queues) for stored in group] for group in groups]
                made |= {target + suffix: tensor for suffix, tensor in packed(groups, parts).items()}
            else:
                made[target] = _stack(groups, queues, dtype)
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        """None: a decoded model is saved as any other, and one that is not decoded is not saved."""
        raise NotImplementedError


def _weight(stored: Stored, queues: Queues) -> torch.Tensor:
    """The weight [out, in] that a runtime sees."""
    return stored.codec.decode(stored.target.unpack(stored.name, stored.codec, _taken(stored, queues)))


def _stack(groups: Sequence[Group], queues: Queues, dtype: torch.dtype) -> torch.Tensor:
    """[experts, out, in], decoded one after the other; gate and up one above the other."""
    whole: torch.Tensor | None = None
    for number, group in enumerate(groups):
        weight = torch.cat([_weight(stored, queues) for stored in group])
        if whole is None:
            whole = torch.empty(len(groups), *weight.shape, dtype=dtype, device=weight.device)
        whole[number] = weight
    assert whole is not None
    return whole


def _taken(stored: Stored, queues: Queues) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight, by name; their shapes are checked again, for transformers may share them among ranks."""
    module = stored.name.removesuffix(".weight")
    projection = module.rpartition(".")[2] if is_expert(stored) else ""
    taken = {}
    for name, part in stored.expected.items():
        tensor = next(queues.get((projection, name.rpartition(".")[2]), iter(())), None)
        shape = None if tensor is None else tuple(tensor.shape)
        if tensor is None or shape != part.spec.shape:
            said = "not there" if shape is None else shape
            raise CheckpointError(
                f"{name}: is {said}, {stored.codec.describe()} wants {part.spec.shape}; tp_plan is not supported"
            )
        taken[name] = tensor
    return taken
