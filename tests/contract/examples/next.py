"""A decoder of MLPs alone."""

from ernie_quant.archs import ernie4_5
from ernie_quant.names import COPY, EMBED, IN, MLP, NORM, OUT, TRANSPOSE, NameMap, Op, Rule

MODEL_TYPES = ("ernie_next",)
RULES = (
    Rule("ernie.embed.weight", COPY, ("model.embed.weight",), ("V", "H"), EMBED, OUT),
    Rule(
        "ernie.layers.{layer}.mix.up_gate_proj.weight",
        Op(True, ("I", "I")),
        ("model.layers.{layer}.mix.gate_proj.weight", "model.layers.{layer}.mix.up_proj.weight"),
        ("I", "H"),
        MLP,
        OUT,
    ),
    Rule(
        "ernie.layers.{layer}.mix.down_proj.weight",
        TRANSPOSE,
        ("model.layers.{layer}.mix.down_proj.weight",),
        ("H", "I"),
        MLP,
        IN,
    ),
    Rule("ernie.norm.weight", COPY, ("model.norm.weight",), ("H",), NORM),
)


def flat(config):
    return config


def name_map(config, names):
    dims = {"H": config["hidden_size"], "I": config["intermediate_size"], "V": config["vocab_size"], "Q": 64, "kv_heads": 2}
    return NameMap(RULES, {"layer": range(config["num_hidden_layers"])}, dims)


config_for = ernie4_5.config_for
