"""The keys of a GGUF file that say what config.json says, there and back. Text models only: llama.cpp has no others of ERNIE.

Source: ggml-org/llama.cpp, src/models/ernie4-5.cpp, src/models/ernie4-5-moe.cpp, src/llama-arch.cpp. What the loader fills
in silently (10000 for `rope.freq_base`) is always written, and must be in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_quant.archs import _rope
from ernie_quant.archs._config import Config, pair, whole, with_rope_theta
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import ConfigError
from ernie_quant.ggml import Value
from ernie_quant.names import NameMap

DENSE, MOE = "ernie4_5", "ernie4_5-moe"
MODEL_TYPES = {DENSE: "ernie4_5", MOE: "ernie4_5_moe"}
COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
COUNTS_OF_EXPERTS = {
    "expert_count": "moe_num_experts",
    "expert_used_count": "moe_k",
    "expert_feed_forward_length": "moe_intermediate_size",
    "interleave_moe_layer_step": "moe_layer_interval",
    "leading_dense_block_count": "moe_layer_start_index",
    "expert_shared_count": "moe_num_shared_experts",
}
REALS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}


def problems(config: Config, table: NameMap) -> list[str]:
    """What of a model llama.cpp computes otherwise, or not at all."""
    found = []
    if "use_bias" in table.flags:
        found.append("config.json: use_bias is true: llama.cpp leaves the biases of o_proj and of all FFNs out")
    if (said := _rope.scaling(config)) is not None:
        found.append(f"config.json: {said}: not written into GGUF files")
    moe = list(table.ids.get("moe", ()))
    last = len(table.ids["layer"]) - 1
    if moe and moe != list(range(moe[0], last + 1)):
        found.append(
            f"config.json: experts are in the layers {_few(moe)}: llama.cpp has them in all from a first one to the last, {last}"
        )
    return found


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")


def keys_of(config: Config, table: NameMap) -> dict[str, Value]:
    """The architecture's keys, from a flat config. Raises ConfigError where one lacks what a program must know."""
    dims, moe = table.dims, list(table.ids.get("moe", ()))
    arch, config = (MOE if moe else DENSE), with_rope_theta(dict(config))
    heads = whole(config, "num_attention_heads")
    values: dict[str, Value] = {
        "block_count": len(table.ids["layer"]), "context_length": whole(config, "max_position_embeddings"),
        "embedding_length": dims["H"], "feed_forward_length": dims["I"],
        "attention.head_count": heads, "attention.head_count_kv": dims["kv_heads"],
        "attention.key_length": dims["Q"] // heads, "attention.value_length": dims["Q"] // heads,
        **{key: _real(config, word) for key, word in REALS.items()},
        "rope.dimension_count": dims["Q"] // heads,
    }  # fmt: skip
    if moe:
        shared = dims["MS"] // dims["M"]
        values |= {
            "expert_count": dims["E"], "expert_used_count": pair(config, "moe_k")[0], "expert_feed_forward_length": dims["M"],
            "interleave_moe_layer_step": 1, "leading_dense_block_count": moe[0], "expert_shared_count": shared,
            **({"expert_shared_feed_forward_length": dims["MS"]} if shared else {}),
        }  # fmt: skip
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in values.items()}}


def _real(config: Config, key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        shown = "missing" if key not in config else repr(value)[:80]
        raise ConfigError(f"config.json: {key} is {shown}, and llama.cpp computes with it; give it its number")
    return float(value)


def _shortest(value: Any) -> Any:
    """1e-05 and not float32's 9.99999974e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_of(keys: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What config.json would say of a GGUF file with these keys and tensors. Raises ConfigError."""
    arch = keys.get("general.architecture")
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise ConfigError(f"general.architecture is {arch!r:.80}; supported are {', '.join(MODEL_TYPES)}")
    counts = COUNTS | (COUNTS_OF_EXPERTS if arch == MOE else {})
    config = {word: keys[f"{arch}.{key}"] for key, word in counts.items() if f"{arch}.{key}" in keys}
    config |= {word: _shortest(keys[f"{arch}.{key}"]) for key, word in REALS.items() if f"{arch}.{key}" in keys}
    embedding = tensors.get("token_embd.weight")
    config |= {
        "model_type": MODEL_TYPES[arch],
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_bias": False,
    }
    if arch == MOE:
        config["moe_use_aux_free"] = any("exp_probs_b" in name for name in tensors)
        config.setdefault("moe_num_shared_experts", 0)
    return config
