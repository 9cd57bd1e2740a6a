"""config.json: values read with their type checked, and the words that Paddle and PT use for the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_quant.errors import ConfigError

Config = Mapping[str, Any]
MAX_COUNT = 1 << 24  # far above every size of these models; a larger number in a config is an attack or an accident
MOST = {"num_hidden_layers": 4096}  # layers are listed one by one; the 424B has 54


@dataclass(frozen=True)
class Facts:
    """What the tensors themselves say, whatever config.json claims."""

    dtype: str  # of the embeddings, in torch's words
    shared_experts: int
    mtp_blocks: int


def whole(config: Config, key: str, least: int = 1, default: int | None = None) -> int:
    """A whole number of at least `least`. Raises ConfigError."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    most = MOST.get(key, MAX_COUNT)
    if type(value) is not int or not least <= value <= most:
        shown = "missing" if key not in config else repr(value)[:80]
        raise ConfigError(f"config.json: {key} is {shown}, not a whole number from {least} to {most}")
    return value


def flag(config: Config, key: str, default: bool = False) -> bool:
    """A boolean. Raises ConfigError."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r:.80}, not true or false")
    return value


def section(config: Config, key: str) -> dict[str, Any]:
    """A nested object. Raises ConfigError."""
    value = config.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"config.json: {key} is {'missing' if key not in config else 'not an object'}")
    return value


def pair(config: Config, key: str, least: int = 1, default: int | None = None) -> tuple[int, int]:
    """[text, vision], or one number that holds for both. Raises ConfigError."""
    value = config.get(key)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ConfigError(f"config.json: {key} has {len(value)} entries, not one for text and one for vision")
        return (whole({key: value[0]}, key, least), whole({key: value[1]}, key, least))
    both = whole(config, key, least, default)
    return (both, both)


def attention_dims(config: Config) -> dict[str, int]:
    """H, Q, KV, I, V and the number of kv heads. Raises ConfigError."""
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    kv_heads = whole(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = whole(config, "head_dim", default=hidden // heads)
    return {
        "H": hidden,
        "Q": heads * head_dim,
        "KV": kv_heads * head_dim,
        "I": whole(config, "intermediate_size"),
        "V": whole(config, "vocab_size"),
        "kv_heads": kv_heads,
    }


def moe_layers(config: Config, start: int, end: int) -> list[int]:
    """Numbers of the layers with experts. Raises ConfigError."""
    layers = whole(config, "num_hidden_layers")
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or not all(k in ("dense", "sparse") for k in kinds):
            raise ConfigError(f"config.json: mlp_layer_types is not a list of {layers} times 'dense' or 'sparse'")
        return [i for i, kind in enumerate(kinds) if kind == "sparse"]
    interval = whole(config, "moe_layer_interval", default=1)
    return [i for i in range(start, min(end, layers - 1) + 1) if (i + 1) % interval == 0]


def last_moe_layer(value: int, layers: int) -> int:
    """The last MoE layer: -1 stands for the last layer of all."""
    return layers - 1 if value < 0 else value


# Paddle's training and kernel switches; PT configs do not have them (what Baidu's own converter leaves out)
PADDLE_ONLY = frozenset(
    [
        "add_tail_layers",
        "compression_ratio",
        "global_aux_loss",
        "moe_aux_loss_lambda",
        "moe_group_orthogonal_loss",
        "moe_orthogonal_loss_lambda",
        "moe_z_loss_lambda",
        "use_fast_ln",
        "use_flash_attention",
        "use_rmsnorm",
        "max_sequence_length",
        "model_name",
        "paddlenlp_version",
        "paddleformers_version",
        "source",
    ]
)


def is_paddle_only(key: str) -> bool:
    """Does the key belong to Paddle alone?"""
    return key in PADDLE_ONLY or key.startswith("fuse_")


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 moved rope_theta into rope_parameters; everything else reads rope_theta."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    return config


def with_dtype(config: dict[str, Any], layout: str, facts: Facts) -> dict[str, Any]:
    """Exactly one dtype key: FastDeploy and ERNIEKit take `dtype` for Paddle and `torch_dtype` for PT."""
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    config["dtype" if layout == "paddle" else "torch_dtype"] = facts.dtype
    return config


def text_config(layout: str, config: Config, facts: Facts, architecture: str, *, moe: bool) -> dict[str, Any]:
    """config.json of a text model in the words of `layout`."""
    out = with_dtype(with_rope_theta(dict(config)), layout, facts)
    out["architectures"] = [architecture]
    if layout == "pt":
        out = {key: value for key, value in out.items() if not is_paddle_only(key)}
        if out.get("head_dim", 0) is None:
            del out["head_dim"]
    if moe:
        # absent, transformers and vLLM assume 2 and initialise them at random
        out["moe_num_shared_experts"] = facts.shared_experts
        if facts.mtp_blocks or "num_nextn_predict_layers" in out:
            out["num_nextn_predict_layers"] = facts.mtp_blocks
    return out
