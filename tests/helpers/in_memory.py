"""The published tensors of a model as transformers 5 holds them in memory, made without it and without this project."""

from __future__ import annotations

import re

import torch

Tensors = dict[str, torch.Tensor]


def fused(table: Tensors) -> Tensors:
    """Of a text model."""
    out = {n.replace(".mlp.moe_statics.", ".mlp.gate.moe_statics."): t for n, t in table.items() if ".mlp.experts." not in n}
    for layer in {n.partition(".mlp.experts.")[0] for n in table if ".mlp.experts." in n}:
        count = len({n.split(".")[5] for n in table if n.startswith(f"{layer}.mlp.experts.")})
        out |= stacks(table, f"{layer}.mlp", f"{layer}.mlp", range(count))
    return out


def stacks(table: Tensors, source: str, target: str, experts: range) -> Tensors:
    """The experts `experts` of `source` in two tensors of `target`: gate over up, and down."""
    of = [{x: table[f"{source}.experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")} for e in experts]
    return {
        f"{target}.experts.gate_up_proj": torch.stack([torch.cat([e["gate"], e["up"]]) for e in of]),
        f"{target}.experts.down_proj": torch.stack([e["down"] for e in of]),
    }


def fused_vl(table: Tensors, experts: int) -> Tensors:
    """Of a VL model with so many experts of each kind."""
    out: Tensors = {}
    for name, tensor in table.items():
        layer, _, rest = name.partition(".mlp.")
        there = layer.replace("model.", "model.language_model.", 1) + ".mlp"
        if ".mlp.experts." in name:
            for branch, numbers in (("text_moe", range(experts)), ("vision_moe", range(experts, 2 * experts))):
                out |= stacks(table, f"{layer}.mlp", f"{there}.{branch}", numbers)
        elif rest in ("gate.weight", "gate.weight_1"):
            out[f"{there}.{'vision' if rest.endswith('_1') else 'text'}_moe.gate.weight"] = tensor.t()
        elif rest.startswith("moe_statics."):
            out |= {
                f"{there}.{branch}_moe.gate.{rest}": row for branch, row in zip(("text", "vision"), tensor.split(1), strict=True)
            }
        else:
            out[_plain(name)] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _plain(name: str) -> str:
    name = re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)
    name = re.sub(r"^vision_model\.", "model.vision_tower.", name)
    for number, part in (("0", "fc1"), ("2", "fc2"), ("3", "ln")):
        name = name.replace(f"_linear.{number}.", f"_linear.{part}.")
    return name
