"""transformers' names for what it holds in memory otherwise than it is published (its conversion_mapping.py).

It saves them so with `save_original_format=False`, and `torch.save(model.state_dict())` does: the experts of a layer in one
tensor, gate and up together, and the routing bias below the router. Those of VL models have other names nearly everywhere.
"""

from __future__ import annotations

import re

from ernie_quant.names import EXPERT, VISION_EXPERT

BRANCHES = {EXPERT: "text_moe", VISION_EXPERT: "vision_moe"}
STACKED = (
    (re.compile(r"\.experts\.\d+\.(?:gate|up)_proj\.weight$"), ".experts.gate_up_proj"),
    (re.compile(r"\.experts\.\d+\.down_proj\.weight$"), ".experts.down_proj"),
)
VL = (
    (re.compile(r"\.mlp\.gate\.weight$"), ".mlp.text_moe.gate.weight"),
    (re.compile(r"\.mlp\.gate\.weight_1$"), ".mlp.vision_moe.gate.weight"),
    (re.compile(r"^model\.(?=(?:layers|embed_tokens|norm)\.)"), "model.language_model."),
    (re.compile(r"^vision_model\."), "model.vision_tower."),
    (re.compile(r"_linear\.0\."), "_linear.fc1."),
    (re.compile(r"_linear\.2\."), "_linear.fc2."),
    (re.compile(r"_linear\.3\."), "_linear.ln."),
)


def text(name: str, role: str) -> tuple[str, ...]:
    """The tensor that holds a PT tensor of a text model."""
    return (_renamed(name, STACKED).replace(".mlp.moe_statics.", ".mlp.gate.moe_statics."),)


def vl(name: str, role: str) -> tuple[str, ...]:
    """The tensors that hold a PT tensor of a VL model; the routing biases of text and vision are two."""
    name = _renamed(_renamed(name, STACKED), VL)
    if role in BRANCHES:
        return (name.replace(".mlp.", f".mlp.{BRANCHES[role]}."),)
    if ".mlp.moe_statics." in name:
        return tuple(name.replace(".mlp.", f".mlp.{branch}.gate.") for branch in BRANCHES.values())
    return (name,)


def is_stack(name: str) -> bool:
    """Is it a tensor that holds all experts of a layer?"""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def is_vl(name: str) -> bool:
    """Is it one of a VL model in memory?"""
    return name.startswith(("model.language_model.", "model.vision_tower."))


def _renamed(name: str, changes: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, there in changes:
        name = pattern.sub(there, name)
    return name
