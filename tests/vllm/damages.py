"""Of the judge itself: what is damaged on purpose must be found, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def one_code_of_wint2(stored: Tensors) -> None:
    stored[f"{EXPERT}.5.down_proj.weight_packed"][7, 40] ^= 1


def local_scales_swapped(stored: Tensors) -> None:
    scale = stored[f"{EXPERT}.2.up_proj.weight_scale"]
    scale[:, 0] = scale[:, 0] << 4 | scale[:, 0] >> 4


def code_zero_of_one_row(stored: Tensors) -> None:
    stored[f"{EXPERT}.6.gate_proj.weight_channel_scale"][100, 2] += 1


def local_scale_lost(stored: Tensors) -> None:
    del stored[f"{EXPERT}.4.up_proj.weight_scale"]


def too_short(stored: Tensors) -> None:
    name = f"{EXPERT}.0.gate_proj.weight_packed"
    stored[name] = stored[name][:, :-1].contiguous()


def unknown_version(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] = 2


# of config.json
CONFIGS: dict[str, Callable[[dict[str, Any]], None]] = {"a version that is not known": unknown_version}
DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "gate and up swapped in one expert": swapped_gate_and_up,
    "scales of one row in another order": scales_in_another_order,
    "router off by a millionth": router_off_by_a_millionth,
    "a number of its own for all scales of up_proj": another_number_for_all_scales,
    "one code of a vision expert": one_code_of_a_vision_expert,
    "one weight of the draft": one_weight_of_the_draft,
    "one code of WINT2": one_code_of_wint2,
    "local scales of one group swapped": local_scales_swapped,
    "code zero of one row": code_zero_of_one_row,
    "a local scale is lost": local_scale_lost,
    "a tensor is too short": too_short,
}


def do(damage: str, folder: Path) -> None:
    """Write the checkpoint anew, with the damage."""
    if damage in CONFIGS:
        config = json.loads((folder / "config.json").read_text())
        CONFIGS[damage](config)
        (folder / "config.json").write_text(json.dumps(config))
        return
    stored = {name: tensor.clone() for name, tensor in tensors(folder).items()}
    DAMAGES[damage](stored)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
