"""ERNIE 4.5 text models with experts (21B-A3B, 300B-A47B), with or without a block for multi-token prediction (MTP)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from ernie_quant.archs import _rope
from ernie_quant.archs._config import Config, Facts, attention_dims, flag, last_moe_layer, moe_layers, text_config, whole
from ernie_quant.archs._tables import MODEL, MTP_BLOCK, TEXT_EXPERTS, TIED_HEAD, UNTIED_HEAD
from ernie_quant.names import NameMap

MODEL_TYPES = ("ernie4_5_moe",)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """There is one spelling only."""
    return config


def name_map(config: dict[str, Any], names: Collection[str]) -> NameMap:
    """The table of a model with experts. Raises ConfigError."""
    layers = whole(config, "num_hidden_layers")
    end = last_moe_layer(whole(config, "moe_layer_end_index", -1, layers - 1), layers)
    moe = moe_layers(config, whole(config, "moe_layer_start_index", 0, 0), end)
    width, shared = whole(config, "moe_intermediate_size"), shared_experts(config, names)
    ids: dict[str, Sequence[int]] = {
        "layer": range(layers),
        "moe": moe,
        "dense": sorted(set(range(layers)) - set(moe)),
        "expert": range(whole(config, "moe_num_experts")),
        "shared": moe if shared else (),
        "mtp": mtp_blocks(config, names),
    }
    dims = attention_dims(config) | {"M": width, "MS": width * shared, "E": len(ids["expert"])}
    head = TIED_HEAD if flag(config, "tie_word_embeddings", default=True) else UNTIED_HEAD
    return NameMap((*MODEL, head, *TEXT_EXPERTS, *MTP_BLOCK), ids, dims, flags(config))


def flags(config: Config) -> frozenset[str]:
    """What must be there by config.json; a routing bias unless it says that there is none."""
    found = {"use_bias": flag(config, "use_bias"), "routing_bias": flag(config, "moe_use_aux_free", default=True)}
    return frozenset(name for name, is_set in found.items() if is_set)


def shared_experts(config: Config, names: Collection[str]) -> int:
    """How many shared experts (fused in one module); where config.json does not say, the tensors do."""
    if not any(".shared_experts." in name for name in names):
        return whole(config, "moe_num_shared_experts", 0, 0)
    return whole(config, "moe_num_shared_experts", 0, 2)


def mtp_blocks(config: Config, names: Collection[str]) -> Sequence[int]:
    """Numbers of the MTP blocks: those config.json names, if any is stored, and those that are stored anyhow."""
    stored = {int(m[1]) for name in names if (m := re.search(r"\.mtp_\w+\.(\d{1,4})\.", name))}
    if not stored:  # transformers drops the block when it saves, and leaves the config as it was
        return ()
    return range(max(whole(config, "num_nextn_predict_layers", 0, 0), max(stored) + 1))


def config_for(layout: str, config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """config.json in the words of `layout`."""
    return _rope.in_words_of(layout, config, text_config(layout, config, facts, "Ernie4_5_MoeForCausalLM", moe=True))
