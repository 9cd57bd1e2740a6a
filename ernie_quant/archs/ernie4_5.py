"""ERNIE 4.5 dense text models (0.3B)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ernie_quant.archs import _rope
from ernie_quant.archs._config import Facts, attention_dims, flag, text_config, whole
from ernie_quant.archs._tables import MODEL, TIED_HEAD, UNTIED_HEAD
from ernie_quant.names import NameMap

MODEL_TYPES = ("ernie4_5",)
UNSAID_HEAD_DIM = 128  # what transformers' dense class takes where config.json says nothing; Paddle's divides


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """There is one spelling only."""
    return config


def name_map(config: dict[str, Any], names: Collection[str]) -> NameMap:
    """The table of a dense model. Raises ConfigError."""
    layers = range(whole(config, "num_hidden_layers"))
    head = TIED_HEAD if flag(config, "tie_word_embeddings", default=True) else UNTIED_HEAD
    flags = frozenset({"use_bias"} if flag(config, "use_bias") else ())
    return NameMap((*MODEL, head), {"layer": layers, "dense": layers}, attention_dims(config), flags)


def config_for(layout: str, config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """config.json in the words of `layout`; transformers spells the class without the underscore."""
    architecture = "Ernie4_5_ForCausalLM" if layout == "paddle" else "Ernie4_5ForCausalLM"
    out = _rope.in_words_of(layout, config, text_config(layout, config, facts, architecture, moe=False))
    head_dim = whole(config, "hidden_size") // whole(config, "num_attention_heads")
    if layout == "pt" and out.get("head_dim") is None and head_dim != UNSAID_HEAD_DIM:
        out["head_dim"] = head_dim
    return out
