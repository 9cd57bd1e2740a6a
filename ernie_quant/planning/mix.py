"""Which type for which tensor of a GGUF file: the mixes that llama.cpp's quantizer knows by the name of a file type.

Source: ggml-org/llama.cpp, src/llama-quant.cpp (llama_tensor_get_type). Embeddings that are the head, too, count as the head.
Models with eight experts have a rule of their own there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ernie_quant import codecs
from ernie_quant.codecs import Codec
from ernie_quant.codecs._rounded import Rounded
from ernie_quant.names import EMBED, EXPERT, HEAD, MTP, QUANTIZABLE, ROLES, NameMap
from ernie_quant.planning.recipe import RecipeRule

Layers = Callable[[int], bool]
Exceptions = list[tuple[str, Layers, str]]
PLAIN = ("F32", "F16", "BF16")
# name of the mix -> type of most of its weights
BASE = {
    **{name: name for name in PLAIN},
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K",
    "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q4_0": "Q4_0", "Q3_K_M": "Q3_K", "Q2_K": "Q2_K",
}  # fmt: skip
V, K, OUT, DOWN = r"self_attn\.v_proj", r"self_attn\.k_proj", r"self_attn\.o_proj", r"\.down_proj"
EIGHT = 8  # experts
ALL = tuple(role for role in ROLES if role in QUANTIZABLE and role != MTP)


@dataclass(frozen=True)
class Shape:
    """What of a model a mix depends on: layers, heads per kv head, experts, whether embeddings are the head too."""

    layers: int
    heads_per_kv: int
    experts: int
    tied: bool

    @staticmethod
    def of(model: NameMap) -> Shape:
        """From its table."""
        tied = not any(rule.role == HEAD and rule.need == "always" for rule in model.rules)
        return Shape(len(model.ids["layer"]), model.dims["Q"] // model.dims["KV"], model.dims.get("E", 0), tied)

    def more_bits(self, layer: int) -> bool:
        """The first and the last eighth of the layers, and every third between them."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def first(self, part: int) -> Layers:
        """The first of so many parts."""
        return lambda layer: layer < self.layers // part


def rules(mix: str, model: NameMap, *, pure: bool = False, experts_only: bool = False) -> list[RecipeRule]:
    """The rules of a file type for a model; `pure`: one type for all that may have it."""
    base = codec_of(BASE[mix])
    if experts_only:
        hint = "this model has no experts; without --experts-only its other linears are quantized"
        return [RecipeRule(base, (EXPERT,), if_unused=hint)]
    if mix in PLAIN or pure:
        return [RecipeRule(base, ALL, optional=True), RecipeRule(base, (EMBED, HEAD), optional=True)]
    return list(_mixed(mix, base, Shape.of(model)))


def _mixed(mix: str, base: Codec, shape: Shape) -> Iterator[RecipeRule]:
    for match, layers, of in _exceptions(mix, shape):
        numbers = [str(layer) for layer in range(shape.layers) if layers(layer)]
        if numbers:
            yield RecipeRule(codec_of(of), ALL, rf"\.layers\.(?:{'|'.join(numbers)})\..*{match}", optional=True)
    yield RecipeRule(base, ALL)
    head = codec_of(mix if mix == "Q8_0" else "Q6_K")
    yield RecipeRule(head, (EMBED,) if shape.tied else (HEAD,))
    yield RecipeRule(base, (EMBED,), optional=True)


def codec_of(type_: str) -> Codec:
    """A dtype of plain weights, or a type of blocks."""
    return Rounded(type_) if type_ in PLAIN else codecs.make(type_.lower(), {})


def _exceptions(mix: str, shape: Shape) -> Exceptions:
    """(which linears, in which layers, their type), first match wins."""
    value_bits: Exceptions = [(V, _every, "Q5_K")] if shape.heads_per_kv >= 4 else []
    found: dict[str, Exceptions] = {
        "Q5_K_M": [(V, shape.more_bits, "Q6_K"), (DOWN, shape.more_bits, "Q6_K")],
        "Q4_K_M": [(V, shape.more_bits, "Q6_K"), (DOWN, shape.more_bits, "Q6_K")],
        "Q4_K_S": [(V, lambda layer: layer < 4, "Q5_K"), (DOWN, shape.first(8), "Q5_K")],
        "Q3_K_M": [
            (V, lambda layer: layer < 2, "Q5_K"), (V, _every, "Q4_K"),
            (DOWN, shape.first(16), "Q5_K"), (DOWN, _every, "Q4_K"), (OUT, _every, "Q4_K"),
        ],
        "Q2_K": [(V, _every, "Q4_K" if shape.heads_per_kv >= 4 else "Q3_K"), (DOWN, _every, "Q3_K"), (OUT, _every, "Q3_K")],
        "IQ4_XS": [*value_bits, (DOWN, shape.first(8), "Q5_K")],
        "IQ4_NL": [*value_bits, (DOWN, shape.first(8), "Q5_K")],
    }  # fmt: skip
    return [*(_of_eight(mix) if shape.experts == EIGHT else []), *found.get(mix, [])]


def _of_eight(mix: str) -> Exceptions:
    wider: Exceptions = [(OUT, _every, "Q5_K")] if mix in ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "IQ4_NL") else []
    return [(f"(?:{V}|{K})", _every, "Q8_0"), *wider]


def _every(layer: int) -> bool:
    return True
