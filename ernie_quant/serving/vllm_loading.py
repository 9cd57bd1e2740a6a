"""vLLM's loader of experts with two questions more: is each tensor of the shape that it must have, and did every one come?

vLLM copies a tensor that is too small into a corner, and asks of quantized models nothing about those that are missing
(fused_moe/routed_experts.py, _narrow_expert_data_for_padding; model_loader/default_loader.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.dtypes import dtype_name
from ernie_quant.errors import CheckpointError
from ernie_quant.runtimes import _wint2

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # vLLM's names of what a file has


class Loading:
    """Of the experts of one layer: `hidden` and `width` (of an expert, on all ranks together)."""

    def __init__(self, layer_name: str, loader: Callable[..., Any], hidden: int, width: int) -> None:
        self._layer_name, self._loader = layer_name, loader
        self._specs = {
            shard: {name.removeprefix("."): part.spec for name, part in _wint2.parts("", TensorSpec(shape, "BF16")).items()}
            for shard, shape in {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}.items()
        }
        self._came: set[tuple[str, str, int]] = set()

        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> Any:
            kind = next(kind for kind in self._specs[shard_id] if weight_name.endswith(f"_{kind}"))
            self._check_shape(loaded_weight, kind, shard_id, expert_id)
            success = self._loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
            if success:
                self._came.add((kind, shard_id, expert_id))
            return success if return_success else None

        load.supports_moe_loading = True  # type: ignore[attr-defined]  # vLLM asks
        self.load = load

    def _check_shape(self, stored: torch.Tensor, kind: str, shard: str, expert: int) -> None:
        wanted = self._specs[shard][kind]
        if (tuple(stored.shape), dtype_name(stored.dtype)) != (wanted.shape, wanted.dtype):
            raise CheckpointError(
                f"{self._layer_name}.{expert}.{PROJECTIONS[shard]}.{kind}: {dtype_name(stored.dtype)} {tuple(stored.shape)},"
                f" but config.json asks for {wanted.dtype} {wanted.shape}; try ernie-quant verify"
            )

    def check(self, experts: int, blank: bool) -> None:
        """After loading: raises CheckpointError where tensors of `experts` experts did not come.

        A loader that is not vLLM's usual one (dummy weights, sharded states) fills parameters directly: then none came, and
        parameters are not `blank`.
        """
        everything = sum(map(len, self._specs.values())) * experts
        if len(self._came) == everything or not (self._came or blank):
            return
        seen = sorted({expert for *_, expert in self._came})
        wanted = [(kind, shard, n) for n in seen for shard, kinds in self._specs.items() for kind in kinds]
        lost = [f"{n}.{PROJECTIONS[shard]}.{kind}" for kind, shard, n in wanted if (kind, shard, n) not in self._came]
        raise CheckpointError(
            f"{self._layer_name}: {everything - len(self._came)} of {everything} tensors of its experts are not in the checkpoint"
            f"{f', {self._layer_name}.{lost[0]} first' if lost else ''}; try ernie-quant verify"
        )
