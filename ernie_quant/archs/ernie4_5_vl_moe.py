"""ERNIE 4.5 VL models (VL-28B-A3B, VL-424B-A47B): text and vision experts, a vision tower and a resampler.

config.json comes in two spellings: the flat one of Baidu's repositories and of vLLM (lists [text, vision],
`im_patch_id`), and the nested one of transformers (`text_config`, `mlp_layer_types`). The flat one is worked with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ernie_quant.archs import _rope
from ernie_quant.archs._config import (
    Config,
    Facts,
    attention_dims,
    flag,
    last_moe_layer,
    moe_layers,
    pair,
    section,
    whole,
    with_dtype,
    with_rope_theta,
)
from ernie_quant.archs._tables import MODEL, TIED_HEAD, UNTIED_HEAD, ffn
from ernie_quant.archs.ernie4_5_moe import flags, shared_experts
from ernie_quant.errors import ConfigError
from ernie_quant.names import COPY, EXPERT, RESAMPLER, ROUTER, SHARED, TRANSPOSE, VISION, VISION_EXPERT, NameMap, Rule

MODEL_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe")
# what the released model code takes where config.json says nothing (configuration_ernie4_5_vl.py of the -PT repositories)
UNSAID_ROPE_THETA, UNSAID_FREQ_ALLOCATION, UNSAID_VISION_EPS, UNSAID_TEMPORAL_CONV = 500000.0, 20, 1e-6, 2

# VD vision width, VF vision FFN, VP values per patch, RS spatial width, RT temporal input of the resampler
_S, _B, _M = "ernie.resampler_model.spatial_linear", "vision_model.blocks.{block}", "ernie.layers.{moe}.mlp"
# fmt: off
RULES = (
    *MODEL,
    # the routers of VL models are not transposed in PT, unlike those of text models
    Rule(f"{_M}.gate.weight",   COPY, ("model.layers.{moe}.mlp.gate.weight",), ("H", "E"), ROUTER),
    Rule(f"{_M}.gate.weight_1", COPY, ("model.layers.{moe}.mlp.gate.weight_1",), ("H", "E"), ROUTER),
    Rule(f"{_M}.moe_statics.e_score_correction_bias", COPY, ("model.layers.{moe}.mlp.moe_statics.e_score_correction_bias",), ("2", "E"), ROUTER, None, "routing_bias"),
    *ffn(f"{_M}.experts.{{expert}}", "M", EXPERT),
    *ffn(f"{_M}.experts.{{vision_expert}}", "M1", VISION_EXPERT),
    *ffn("ernie.layers.{shared}.mlp.shared_experts", "MS", SHARED),
    Rule(f"{_S}.0.weight", TRANSPOSE, (f"{_S}.0.weight".replace("ernie.", "model."),), ("RS", "RS"), RESAMPLER),
    *(Rule(f"ernie.resampler_model.{x}", op, (f"model.resampler_model.{x}",), shape, RESAMPLER) for x, op, shape in (
        ("spatial_linear.0.bias",    COPY,      ("RS",)),
        ("spatial_linear.2.weight",  TRANSPOSE, ("RS", "RS")),
        ("spatial_linear.2.bias",    COPY,      ("RS",)),
        ("spatial_linear.3.weight",  COPY,      ("RS",)),
        ("spatial_linear.3.bias",    COPY,      ("RS",)),
        ("temporal_linear.0.weight", TRANSPOSE, ("RS", "RT")),
        ("temporal_linear.0.bias",   COPY,      ("RS",)),
        ("temporal_linear.2.weight", TRANSPOSE, ("RS", "RS")),
        ("temporal_linear.2.bias",   COPY,      ("RS",)),
        ("temporal_linear.3.weight", COPY,      ("RS",)),
        ("temporal_linear.3.bias",   COPY,      ("RS",)),
        ("mlp.weight",               TRANSPOSE, ("H", "RS")),
        ("mlp.bias",                 COPY,      ("H",)),
        ("after_norm.weight",        COPY,      ("H",)),
    )),
    *(Rule(name, op, (name,), shape, VISION) for name, op, shape in (
        ("vision_model.patch_embed.proj.weight", TRANSPOSE, ("VD", "VP")),
        (f"{_B}.attn.qkv.weight",  TRANSPOSE, ("3VD", "VD")),
        (f"{_B}.attn.qkv.bias",    COPY,      ("3VD",)),
        (f"{_B}.attn.proj.weight", TRANSPOSE, ("VD", "VD")),
        (f"{_B}.attn.proj.bias",   COPY,      ("VD",)),
        (f"{_B}.mlp.fc1.weight",   TRANSPOSE, ("VF", "VD")),
        (f"{_B}.mlp.fc1.bias",     COPY,      ("VF",)),
        (f"{_B}.mlp.fc2.weight",   TRANSPOSE, ("VD", "VF")),
        (f"{_B}.mlp.fc2.bias",     COPY,      ("VD",)),
        (f"{_B}.norm1.weight",     COPY,      ("VD",)),
        (f"{_B}.norm1.bias",       COPY,      ("VD",)),
        (f"{_B}.norm2.weight",     COPY,      ("VD",)),
        (f"{_B}.norm2.bias",       COPY,      ("VD",)),
        ("vision_model.ln.weight", COPY,      ("VD",)),
        ("vision_model.ln.bias",   COPY,      ("VD",)),
    )),
)
# fmt: on


def name_map(config: dict[str, Any], names: Collection[str]) -> NameMap:
    """The table of a VL model, from a flat config. Raises ConfigError."""
    layers = whole(config, "num_hidden_layers")
    start = pair(config, "moe_layer_start_index", 0, 0)
    end = tuple(last_moe_layer(e, layers) for e in pair(config, "moe_layer_end_index", -1, layers - 1))
    moe = [moe_layers(config, s, e) for s, e in zip(start, end, strict=True)]
    if moe[0] != moe[1]:
        raise ConfigError(f"config.json: text experts are in the layers {moe[0]}, vision experts in {moe[1]}; they must agree")
    experts, widths = pair(config, "moe_num_experts"), pair(config, "moe_intermediate_size")
    if experts[0] != experts[1]:
        raise ConfigError(f"config.json: {experts[0]} text and {experts[1]} vision experts cannot share a routing bias [2, E]")
    shared = shared_experts(config, names)
    ids: dict[str, Sequence[int]] = {
        "layer": range(layers),
        "moe": moe[0],
        "dense": sorted(set(range(layers)) - set(moe[0])),
        "expert": range(experts[0]),
        "vision_expert": range(experts[0], sum(experts)),
        "shared": moe[0] if shared else (),
        "block": range(whole(section(config, "vision_config"), "depth")),
    }
    dims = {"E": experts[0], "M": widths[0], "M1": widths[1], "MS": widths[0] * shared}
    head = TIED_HEAD if flag(config, "tie_word_embeddings", default=True) else UNTIED_HEAD
    return NameMap((*RULES, head), ids, attention_dims(config) | dims | _vision_dims(config), flags(config))


def _vision_dims(config: Config) -> dict[str, int]:
    vision = section(config, "vision_config")
    width = whole(vision, "hidden_size")
    resampler = whole(config, "pixel_hidden_size", default=width) * whole(config, "spatial_conv_size", default=2) ** 2
    return {
        "VD": width,
        "VF": whole(vision, "intermediate_size", default=width * whole(vision, "mlp_ratio", default=4)),
        "VP": whole(vision, "in_channels", default=3) * whole(vision, "patch_size", default=14) ** 2,
        "RS": resampler,
        "RT": resampler * whole(config, "temporal_conv_size", default=UNSAID_TEMPORAL_CONV),
    }


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The flat spelling of either. Raises ConfigError."""
    if "text_config" not in config:
        return config
    text, vision = dict(section(config, "text_config")), dict(section(config, "vision_config"))
    layers = whole(text, "num_hidden_layers")
    moe = moe_layers(text, 1, layers - 1)
    if moe != list(range(min(moe, default=0), max(moe, default=-1) + 1)):
        raise ConfigError("config.json: mlp_layer_types has dense layers between sparse ones; the flat spelling cannot say that")
    experts, rope = pair(text, "moe_num_experts"), text.get("rope_parameters")
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    scaled = {_rope.RATIO: config.get(_rope.RATIO)} | text
    for key in ("model_type", "mlp_layer_types", "rope_parameters", "dtype", "torch_dtype"):
        text.pop(key, None)
    out = with_rope_theta({**text, "rope_parameters": rope})
    del out["rope_parameters"]
    out |= {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        "tie_word_embeddings": flag(config, "tie_word_embeddings", default=True),
        "moe_num_experts": list(experts),
        "moe_layer_start_index": [moe[0]] * 2 if moe else [layers] * 2,
        "moe_layer_end_index": [moe[-1]] * 2 if moe else [layers] * 2,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "rope_3d": True,
        "pixel_hidden_size": whole(vision, "hidden_size"),
        "im_patch_id": whole(config, "image_token_id", 0),
        "spatial_conv_size": whole(vision, "spatial_merge_size", default=2),
        "temporal_conv_size": whole(vision, "temporal_merge_size", default=2),
        "vision_config": _flat_vision(vision),
    }
    if isinstance(sections, list) and len(sections) == 3:
        out["freq_allocation"] = sections[2]
    return _rope.in_words_of("paddle", scaled, out)


def _flat_vision(vision: dict[str, Any]) -> dict[str, Any]:
    width = whole(vision, "hidden_size")
    ratio, rest = divmod(whole(vision, "intermediate_size", default=4 * width), width)
    if rest:
        raise ConfigError(f"config.json: vision_config.intermediate_size is no multiple of hidden_size {width}")
    kept = ("depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size", "spatial_merge_size")
    out = {key: vision[key] for key in kept if key in vision}
    return out | {"embed_dim": width, "mlp_ratio": ratio, "model_type": "DFNRope_vision_transformer"}


def config_for(layout: str, config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """config.json in the words of `layout`: paddle, pt (flat) or transformers (nested)."""
    if layout != "paddle":
        _rope.refuse_images(config)
    if layout == "transformers":
        return _nested(config, facts)
    out = _rope.in_words_of(layout, config, with_dtype(dict(config), layout, facts))
    out["architectures"], out["model_type"] = ["Ernie4_5_VLMoeForConditionalGeneration"], "ernie4_5_moe_vl"
    out["moe_num_shared_experts"] = facts.shared_experts
    return out


def _nested(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    layers, vision = whole(config, "num_hidden_layers"), section(config, "vision_config")
    experts, widths = pair(config, "moe_num_experts"), pair(config, "moe_intermediate_size")
    end = last_moe_layer(pair(config, "moe_layer_end_index", -1, layers - 1)[0], layers)
    moe = set(moe_layers(config, pair(config, "moe_layer_start_index", 0, 0)[0], end))
    dims = attention_dims(config)
    time = whole(config, "freq_allocation", default=UNSAID_FREQ_ALLOCATION)
    space = (dims["KV"] // dims["kv_heads"] // 2 - time) // 2
    theta = config.get("rope_theta", UNSAID_ROPE_THETA)
    copied = (
        "hidden_size", "intermediate_size", "max_position_embeddings", "moe_k", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "use_bias", "pad_token_id",
        "bos_token_id", "eos_token_id", "hidden_act", "head_dim", "initializer_range",
    )  # fmt: skip
    text = {key: config[key] for key in copied if config.get(key) is not None} | {
        "model_type": "ernie4_5_vl_moe_text",
        "dtype": facts.dtype,
        "moe_num_experts": experts[0],
        "moe_intermediate_size": list(widths),
        "moe_num_shared_experts": facts.shared_experts,
        "mlp_layer_types": ["sparse" if i in moe else "dense" for i in range(layers)],
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [space, space, time]},
    }
    vision_dims = _vision_dims(config)
    kept = ("depth", "hidden_act", "num_heads", "in_channels", "patch_size", "spatial_merge_size")
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "dtype": facts.dtype,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", default=True),
        "image_token_id": whole(config, "im_patch_id", 0),
        "text_config": text,
        "vision_config": {key: vision[key] for key in kept if key in vision}
        | {
            "model_type": "ernie4_5_vl_moe_vision",
            "hidden_size": vision_dims["VD"],
            "intermediate_size": vision_dims["VF"],
            "temporal_merge_size": whole(config, "temporal_conv_size", default=UNSAID_TEMPORAL_CONV),
            "rms_norm_eps": vision.get("rms_norm_eps", UNSAID_VISION_EPS),
        },
    }
