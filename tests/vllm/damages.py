"""Of the judge itself: what is damaged on purpose must be found, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from helpers.models import tensors
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts"


def swapped_gate_and_up(stored: Tensors) -> None:
    gate, up = (f"{EXPERT}.3.{name}_proj.weight_packed" for name in ("gate", "up"))
    stored[gate], stored[up] = stored[up], stored[gate]


def scales_in_another_order(stored: Tensors) -> None:
    stored[f"{EXPERT}.3.down_proj.weight_scale"][0] = stored[f"{EXPERT}.3.down_proj.weight_scale"][0].flip(0)


def router_off_by_a_millionth(stored: Tensors) -> None:
    stored["model.layers.2.mlp.gate.weight"][0, 0] *= 1 + 2**-20


def another_number_for_all_scales(stored: Tensors) -> None:
    """What the file says is the same weight; vLLM takes gate's number for both."""
    place = f"{EXPERT}.3.up_proj"
    stored[f"{place}.weight_global_scale"] *= 2
    stored[f"{place}.weight_scale"] = (stored[f"{place}.weight_scale"].float() * 2).to(torch.float8_e4m3fn)


def one_code_of_a_vision_expert(stored: Tensors) -> None:
    stored[f"{EXPERT}.6.down_proj.weight_packed"][0, 0] ^= 1


def one_weight_of_the_draft(stored: Tensors) -> None:
    stored["model.mtp_block.0.self_attn.q_proj.weight"][0, 0] += 1


DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "gate and up swapped in one expert": swapped_gate_and_up,
    "scales of one row in another order": scales_in_another_order,
    "router off by a millionth": router_off_by_a_millionth,
    "a number of its own for all scales of up_proj": another_number_for_all_scales,
    "one code of a vision expert": one_code_of_a_vision_expert,
    "one weight of the draft": one_weight_of_the_draft,
}


def do(damage: str, folder: Path) -> None:
    """Write the checkpoint anew, with the damage."""
    stored = {name: tensor.clone() for name, tensor in tensors(folder).items()}
    DAMAGES[damage](stored)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
