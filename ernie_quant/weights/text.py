"""The text model inside a model: without the MTP block, and of a VL model what text alone runs through.

A VL model's text experts, routers (stored [in, out]) and the first row of its routing biases are those of a text model with
experts; its 3D RoPE is plain RoPE where all three positions are equal, as they are for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ernie_quant.names import HEAD, MTP, RESAMPLER, ROUTER, VISION, VISION_EXPERT, Weight
from ernie_quant.views import build

VISUAL = (VISION, RESAMPLER, VISION_EXPERT)
WHY = {
    "MTP": "the MTP block: llama.cpp has none for ERNIE",
    "vision": "the vision tower, the resampler and the vision experts: this is the text model, it sees no images",
    "head": "lm_head: it is tied to the embeddings, which llama.cpp takes in its place",
}


def only_text(weights: Sequence[Weight], *, vl: bool) -> list[Weight]:
    """Of canonical weights those of the text model, as a text model has them."""
    kept = [weight for weight in weights if _left_out(weight) is None]
    return [_as_in_text(weight) for weight in kept] if vl else kept


def is_vl(weights: Sequence[Weight]) -> bool:
    """Has it experts for images?"""
    return any(weight.role == VISION_EXPERT for weight in weights)


def left_out(weights: Sequence[Weight]) -> list[str]:
    """A note on each kind of what `only_text` drops."""
    dropped = [why for weight in weights if (why := _left_out(weight)) is not None]
    return [f"left out: {WHY[why]} ({dropped.count(why)} tensors)" for why in dict.fromkeys(dropped)]


def _left_out(weight: Weight) -> str | None:
    if weight.role == MTP:
        return "MTP"
    if weight.role in VISUAL or weight.name.endswith(".gate.weight_1"):
        return "vision"
    tied = weight.role == HEAD and weight.row.rule.need == "never" and weight.name.endswith(".weight")
    return "head" if tied else None


def _as_in_text(weight: Weight) -> Weight:
    if weight.role != ROUTER:
        return weight
    if weight.name.endswith("e_score_correction_bias"):
        return replace(weight, view=build.cut(weight.view, 0, 0, 1))
    return replace(weight, view=build.transpose(weight.view))
