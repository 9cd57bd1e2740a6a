"""Dense models that a MoE class has saved, and the other way round: the tensors say what it is, not model_type."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ernie_quant.archs._config import Config, last_moe_layer, moe_layers, whole
from ernie_quant.errors import ConfigError

DENSE, MOE = "ernie4_5", "ernie4_5_moe"
EXPERT, FFN = re.compile(r"\.mlp\.(experts|gate)\."), re.compile(r"\.layers\.(\d{1,6})\.mlp\.down_proj\.weight$")
LAYER_WITH_EXPERTS = re.compile(r"\.layers\.(\d{1,6})\.mlp\.experts\.")
NEEDED = ("moe_num_experts", "moe_intermediate_size", "moe_k")  # without which a model with experts cannot be run


def as_it_is(config: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """config.json with the model_type that the tensors have, and a note if it had another one. Raises ConfigError."""
    label = config.get("model_type")
    if label not in (DENSE, MOE):
        return config, []
    expert = next((name for name in names if EXPERT.search(name)), None)
    if label == MOE and expert is None and _is_dense(config, names):
        rest = {key: value for key, value in config.items() if not key.startswith("moe_")} | {"model_type": DENSE}
        dropped = sorted(key for key in config if key.startswith("moe_"))
        without = f", without {', '.join(dropped)}" if dropped else ""
        return rest, [f"model_type is {MOE!r}, no tensor is an expert's or a router's: read as the dense {DENSE!r}{without}"]
    if label == DENSE and expert is not None:
        if missing := [key for key in NEEDED if config.get(key) is None]:
            raise ConfigError(
                f"config.json: model_type is {DENSE!r}, a dense model, and the files hold {expert}; of a model with experts"
                f" ({MOE!r}) it lacks {', '.join(missing)}"
            )
        layers = sorted(int(m[1]) for name in names if (m := LAYER_WITH_EXPERTS.search(name)))
        said = {key: value for key, value in config.items() if value is not None} | {"model_type": MOE}
        found = {"moe_layer_start_index": layers[0], "moe_layer_end_index": layers[-1]} if layers else {}
        return found | said, [f"model_type is {DENSE!r}, the files hold {expert}: read as {MOE!r}"]
    return config, []


def _is_dense(config: Config, names: Collection[str]) -> bool:
    """Has every layer a dense FFN, though by config.json some have experts, or there are none to have?"""
    ffn = {int(m[1]) for name in names if (m := FFN.search(name))}
    if ffn != set(range(len(ffn))) or config.get("num_hidden_layers") != len(ffn):
        return False
    experts = config.get("moe_num_experts")
    return type(experts) is not int or experts < 1 or _has_moe_layers(config)


def _has_moe_layers(config: Config) -> bool:
    layers = whole(config, "num_hidden_layers")
    try:
        end = last_moe_layer(whole(config, "moe_layer_end_index", -1, layers - 1), layers)
        return bool(moe_layers(config, whole(config, "moe_layer_start_index", 0, 0), end))
    except ConfigError:
        return True
