"""llama.cpp and what is built on it (Ollama, LM Studio): GGUF files, the experts of a layer stacked in three tensors.

Names and shapes: ggml-org/llama.cpp, src/llama-arch.cpp and src/models/ernie4-5{,-moe}.cpp. RoPE there turns adjacent pairs, as
ERNIE does, so that q and k keep the order of their rows. Norms, routers and their biases must be float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ernie_quant import codecs as codecs_package
from ernie_quant import plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs._ggml import Blocks
from ernie_quant.codecs._rounded import Rounded
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.errors import ConfigError
from ernie_quant.names import NORM, QUANTIZABLE, ROUTER, VOCABULARY
from ernie_quant.runtimes import Linear, Part, _commands, _gguf_file
from ernie_quant.runtimes import _usual as usual
from ernie_quant.runtimes._values import STAGES

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

LAYOUT, FORMAT = "gguf", "gguf"
ROWS = 1
CODECS = (Keep, Blocks)
CONFIG: dict[str, Any] = {}
RECIPES = ("gguf",)
VERSION = 1
TAGS = ("llama.cpp",)
PROGRAM, PARALLEL = "llama.cpp", (STAGES,)
AT_LOAD: dict[str, str] = {}
PER_RANK, SPLITS_VOCABULARY, QUANTIZES_VOCABULARY, CASTS = False, False, True, True
MORE_BITS_FIRST = False
QUANT_METHOD = "gguf"
CHOICES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
}  # fmt: skip
F32_ROLES = (NORM, ROUTER)
suited, one_scale = usual.suited, usual.one_scale
metadata, model_problems, stem, commands = _gguf_file.metadata, _gguf_file.problems, _gguf_file.stem, _commands.llama_cpp

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"self_attn.{x}_proj.weight": f"attn_{x}.weight" for x in "qkv"},
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"mlp.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{x}_proj.weight": f"ffn_{x}_shexp.weight" for x in ("gate", "up", "down")},
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
}
STACKS = {f"ffn_{x}_exps.weight": f"mlp.experts.*.{x}_proj.weight" for x in ("gate", "up", "down")}
BACK = {stored: pt for pt, stored in (OUTSIDE | INSIDE).items()} | STACKS


def name_of(name: str) -> tuple[str, int | None]:
    """A weight's stored tensor, and its number in it if that is a stack; a name that it has no word for as it is."""
    if name in OUTSIDE:
        return OUTSIDE[name], None
    if (found := LAYER.fullmatch(name)) is None:
        return name, None
    layer, rest = found.groups()
    if (expert := EXPERT.fullmatch(rest)) is not None:
        return f"blk.{layer}.ffn_{expert[2]}_exps.weight", int(expert[1])
    return (f"blk.{layer}.{INSIDE[rest]}", None) if rest in INSIDE else (name, None)


def weight_of(name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, …); of a stack with `*` for the expert."""
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if found is None:
        return BACK.get(name, name), name
    return (f"model.layers.{found[1]}.{BACK[found[2]]}" if found[2] in BACK else name), name


def folder(role: str) -> str:
    """All in one."""
    return ""


def kept_as(role: str, spec: TensorSpec, *, quantized: bool) -> str:
    """float32 for all but the matrices that inputs are multiplied with."""
    return spec.dtype if len(spec.shape) == 2 and role not in F32_ROLES else "F32"


def recognizes(config: Mapping[str, Any]) -> bool:
    """What a reader of GGUF files notes."""
    return config.get("quant_method") == QUANT_METHOD


def parts(name: str, codec: Codec, spec: TensorSpec) -> dict[str, Part]:
    """The one stored tensor, or the weight's share of a stack."""
    stored, number = name_of(name)
    shape = codec.specs(spec)["weight"] if isinstance(codec, Keep) else TensorSpec(spec.shape, _dtype(codec))
    dims = len(shape.shape)
    return {stored: Part(shape, 0 if dims else None, 1 if dims > 1 else None, index=number)}


def _dtype(codec: Codec) -> str:
    assert isinstance(codec, Blocks), codec
    return codec.dtype


def constants(name: str, codec: Codec, spec: TensorSpec, once: Encoded) -> dict[str, torch.Tensor]:
    """There are none."""
    return {}


def pack(name: str, codec: Codec, encoded: Encoded) -> dict[str, torch.Tensor]:
    """The rows as they are."""
    return {name_of(name)[0]: encoded["weight" if isinstance(codec, Keep) else "blocks"]}


def unpack(name: str, codec: Codec, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """What was encoded."""
    return {"weight" if isinstance(codec, Keep) else "blocks": stored[name_of(name)[0]]}


def layer_of(name: str, role: str) -> str:
    """The stored tensor: a stack is stored alike."""
    return name_of(name)[0]


alike = layer_of


def candidates(role: str) -> tuple[Codec, ...]:
    """A type for every stored tensor, or the weight as it is."""
    if role not in QUANTIZABLE and role not in VOCABULARY:
        return (KEEP,)
    return (*(codecs_package.make(name.lower(), {}) for name in CHOICES), KEEP)


def fallback(codec: Codec, spec: TensorSpec) -> Codec | None:
    """The type that llama.cpp takes for rows that a block does not divide (src/llama-quant.cpp, tensor_type_fallback)."""
    if not isinstance(codec, Blocks) or codec.dtype not in FALLBACKS:
        return None
    other: Codec = codecs_package.make(FALLBACKS[codec.dtype].lower(), {})
    return other if other.problem(spec) is None else Rounded("F16")


def problems(linears: Sequence[Linear]) -> list[str]:
    """Codecs of other runtimes, and stacks of several types."""
    found = [
        f"{li.name}: cannot be written for this runtime as {li.codec.describe()}"
        for li in linears
        if not isinstance(li.codec, CODECS)
    ]
    forms: dict[str, set[str]] = {}
    for linear in linears:
        forms.setdefault(layer_of(linear.name, linear.role), set()).add(linear.codec.form)
    return found + [
        f"{stack}: is one tensor, but would be stored as {' and '.join(sorted(types))}"
        for stack, types in forms.items()
        if len(types) > 1
    ]


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """Nothing that could be written all the same."""
    return []


def notes(linears: Sequence[Linear]) -> list[str]:
    """Nothing."""
    return []


def quantization_config(linears: Sequence[Linear]) -> dict[str, Any] | None:
    """A GGUF file says the type of every tensor beside its name; there is no config.json."""
    types = {name_of(li.name)[0]: _dtype(li.codec) for li in linears if not isinstance(li.codec, Keep)}
    return {"quant_method": QUANT_METHOD, "types": types} if types else None


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """By the types of stored tensors. Raises ConfigError."""
    if not recognizes(config):
        raise ConfigError(f"config.json: quant_method {config.get('quant_method')!r} is none that this tool writes")
    by_type = {
        module.CODEC.dtype: module.CODEC() for module in plugins.modules(codecs_package) if issubclass(module.CODEC, Blocks)
    }
    types = config["types"]
    return {name: by_type.get(types.get(name_of(name)[0], ""), KEEP) for name, _ in linears}


def misread(config: Mapping[str, Any], linears: Sequence[Linear]) -> list[str]:
    """Nothing says it twice."""
    return []


def library(config: Mapping[str, Any]) -> str:
    """The file format, as hubs call it."""
    return "gguf"


def share_multiple(linear: Linear) -> int:
    """Ranks share nothing: layers are what devices get."""
    return linear.spec.shape[linear.ranks] if linear.ranks is not None else 1
