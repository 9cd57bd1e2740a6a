"""The recipes behind the short commands, with their options and defaults: the one place that knows them.

The command line, the job file and `plan` ask here. A recipe is made of options by `make`; what an option may be is checked
by the codecs. They and the runtimes are imported where they are used, for `--help` wants no more than the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ernie_quant.errors import PlanError
from ernie_quant.planning import packed
from ernie_quant.planning.packed import MOST_LAYERS as MOST_LAYERS
from ernie_quant.planning.packed import one_codec as one_codec

if TYPE_CHECKING:
    from ernie_quant.codecs import Codec
    from ernie_quant.names import NameMap
    from ernie_quant.planning.recipe import Recipe, RecipeRule

WINT4_LAYERS = 7  # experts of layers below this one are WINT4 in a 2-bit model, as in the published ones
GROUP_SIZE, SCALE, EFFORT = 128, "mse", 16
HADAMARD, HADAMARDS = 128, (128, 256, 512, 1024)  # inputs of down_proj that FastDeploy rotates together

GGUF_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q3_K_M", "Q2_K",
)  # fmt: skip
GGUF_TYPE = "Q4_K_M"
SHARD_BYTES = 5_000_000_000  # of other files
GGUF_BYTES = 45_000_000_000  # of a file: that of every type of the 21B is one; what hubs take is a little more

WHICH: Mapping[str, Any] = {"experts_only": False, "mtp": False, "keep_unfit": False}
INTEGERS: Mapping[str, Any] = {"group_size": GROUP_SIZE, "scale": SCALE, **WHICH}
NVFP4: Mapping[str, Any] = {"activations": packed.FLOAT4_ACTIVATIONS[0], **WHICH}
WINT4: Mapping[str, Any] = {"activations": packed.ACTIVATIONS[0], **INTEGERS}
GGUF: Mapping[str, Any] = {"type": GGUF_TYPE, "pure": False, "experts_only": False, "keep_unfit": False}
W4A8: Mapping[str, Any] = {"scale": SCALE, "hadamard_block_size": HADAMARD}
WINT2: Mapping[str, Any] = {"wint4_layers": WINT4_LAYERS, "scale": SCALE, "effort": EFFORT}
WINT2_PACKED: Mapping[str, Any] = {**WINT2, **INTEGERS}


@dataclass(frozen=True)
class BuiltIn:
    """A recipe and the runtime that it is for."""

    recipe: Recipe
    runtime: str


@dataclass(frozen=True)
class _Form:
    """Options with their defaults, and the recipe that is made of them."""

    options: Mapping[str, Any]
    build: Callable[..., Recipe]


@dataclass(frozen=True)
class _Kind:
    """One name: the runtime that it is for if nobody says so, and what it is for a runtime ("" for all others)."""

    default_runtime: str
    forms: Mapping[str, _Form]
    by_text: bool = False  # is it made of what a text shows?

    def form(self, runtime: str) -> _Form:
        """What it is for this runtime."""
        return self.forms[runtime if runtime in self.forms else ""]


def options(name: str, runtime: str) -> Mapping[str, Any]:
    """What a built-in recipe takes for a runtime: option -> default."""
    return KINDS[name].form(runtime).options


def wants_text(name: str) -> bool:
    """Can it be made with calibration only?"""
    return KINDS[name].by_text


def known_runtimes(name: str) -> tuple[str, ...]:
    """The runtimes that a built-in recipe is for, the usual one first."""
    from ernie_quant import runtimes

    usual = KINDS[name].default_runtime
    return (usual, *(other for other in runtimes.storing(name) if other != usual))


def runtimes_of_rules() -> tuple[str, ...]:
    """The runtimes that rules of one's own are for, the usual one first; what FastDeploy's container holds, it says itself."""
    from ernie_quant import runtimes

    found = (*known_runtimes("wint8"), *runtimes.storing("gguf"), *runtimes.storing("wint2"))
    return tuple(dict.fromkeys(found))


def make(name: str, runtime: str = "", **given: Any) -> BuiltIn:
    """The recipe `name` for a runtime, with defaults for what is not given. Raises PlanError or ValueError."""
    runtime = runtime or KINDS[name].default_runtime
    if runtime not in (known := known_runtimes(name)):
        raise PlanError(f"{name} is not stored for {runtime}; it is for {', '.join(known)}", [])
    form = KINDS[name].form(runtime)
    if unknown := sorted(given.keys() - form.options.keys()):
        raise PlanError(f"{name} for {runtime} has no option {', '.join(unknown)}", [])
    recipe = form.build(name, **{**form.options, **given})
    return BuiltIn(replace(recipe, words=_words(name, runtime, form.options, given)), runtime)


def _words(name: str, runtime: str, usual: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The short command with its options; those that are its defaults are left unsaid, but for the type of a GGUF file."""
    words = [COMMANDS.get(name, name)]
    for key, default in sorted(usual.items(), key=lambda item: not isinstance(item[1], bool)):
        value = given.get(key, default)
        if value != default or key == "type":
            words.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join([*words, *([f"--runtime {runtime}"] if runtime != KINDS[name].default_runtime else [])])


def fastdeploy_container(
    name: str, wint4_layers: int | None, *, scale: str = SCALE, effort: int = EFFORT, if_taken: str = ""
) -> Recipe:
    """FastDeploy's container: WINT4 experts below layer `wint4_layers` (None: all of them), WINT2 above, WINT8 for all else.

    `if_taken`: what a user is told where no experts are left for WINT2.
    """
    from ernie_quant.names import EXPERT_ROLES, QUANTIZABLE, ROLES
    from ernie_quant.planning.recipe import Recipe, RecipeRule

    hint = "this model has no experts; FastDeploy's container is for those that have"
    experts = [RecipeRule(_wint(4, scale), EXPERT_ROLES, if_unused=hint)]
    if wint4_layers is not None:
        experts = packed.two_forms(_wint(4, scale), wint4_layers, effort=effort, if_unused=hint, if_taken=if_taken)
    others = tuple(r for r in ROLES if r in QUANTIZABLE and r not in EXPERT_ROLES)
    return Recipe(name, (*experts, RecipeRule(_wint(8, scale), others)))


def all_wint8() -> Recipe:
    """Every linear in WINT8, which FastDeploy makes itself when it loads a plain checkpoint."""
    from ernie_quant.names import QUANTIZABLE, ROLES
    from ernie_quant.planning.recipe import Recipe, RecipeRule

    return Recipe("wint8", (RecipeRule(_wint(8, SCALE), tuple(r for r in ROLES if r in QUANTIZABLE)),))


def _wint(bits: int, scale: str) -> Codec:
    from ernie_quant import codecs

    return codecs.make("rtn", {"bits": bits, "group_size": "channel", "scale": scale, "full_range": False})


def _kept(name: str) -> Recipe:
    from ernie_quant.planning.recipe import CONVERT

    return CONVERT


def _wint4_container(name: str, *, scale: str) -> Recipe:
    return fastdeploy_container(name, None, scale=scale)


def _wint2_container(name: str, *, wint4_layers: int, **options: Any) -> Recipe:
    none_left = packed.none_left(wint4_layers, "wint4 --runtime fastdeploy")
    return fastdeploy_container(name, wint4_layers, if_taken=none_left, **options)


def _w4a8(name: str, *, scale: str, hadamard_block_size: int) -> Recipe:
    from functools import partial

    from ernie_quant.planning.recipe import Recipe

    if hadamard_block_size not in HADAMARDS:
        raise ValueError(f"hadamard_block_size is {hadamard_block_size!r}, not one of {', '.join(map(str, HADAMARDS))}")
    return Recipe(name, (), rules_of=partial(_w4a8_rules, scale, hadamard_block_size))


def _w4a8_rules(scale: str, block: int, model: NameMap) -> list[RecipeRule]:
    """down_proj is rotated; q, k and v bring the scales of the cache with them, but for those of the MTP block."""
    from ernie_quant import codecs
    from ernie_quant.names import ATTENTION, EXPERT_ROLES, QUANTIZABLE, ROLES
    from ernie_quant.planning.recipe import RecipeRule

    hint = "this model has no experts; w4a8 is for those that have"
    others = tuple(r for r in ROLES if r in QUANTIZABLE and r not in EXPERT_ROLES)
    cached = codecs.make("rtn_kv", {"cached_channels": model.dims["KV"], "scale": scale})
    return [
        RecipeRule(codecs.make("w4a8", {"hadamard_block_size": block, "scale": scale}), EXPERT_ROLES, r"\.down_proj\.", hint),
        RecipeRule(codecs.make("w4a8", {"scale": scale}), EXPERT_ROLES, if_unused=hint),
        RecipeRule(cached, (ATTENTION,), r"\.[qkv]_proj\."),
        RecipeRule(_wint(8, scale), others),
    ]


def _gguf(name: str, *, type: str, pure: bool, experts_only: bool, keep_unfit: bool) -> Recipe:
    from functools import partial

    from ernie_quant.planning import mix
    from ernie_quant.planning.recipe import Recipe

    if type not in GGUF_TYPES:
        raise ValueError(f"type is {type!r}, not one of {', '.join(GGUF_TYPES)}")
    return Recipe(type, (), keep_unfit, rules_of=partial(mix.rules, type, pure=pure, experts_only=experts_only))


COMMANDS = {"pt": "convert --to pt", "paddle": "convert --to paddle"}  # of recipes that have no command of their name
VLLM, FASTDEPLOY, LLAMA_CPP = "vllm", "fastdeploy", "llama_cpp"
KINDS: Mapping[str, _Kind] = {
    "pt": _Kind(VLLM, {"": _Form({}, _kept)}),
    "paddle": _Kind(FASTDEPLOY, {"": _Form({}, _kept)}),
    "wint4": _Kind(
        VLLM,
        {
            "": _Form(INTEGERS, packed.integers),
            VLLM: _Form(WINT4, packed.wint4),
            FASTDEPLOY: _Form({"scale": SCALE}, _wint4_container),
        },
    ),
    "wint8": _Kind(VLLM, {"": _Form(INTEGERS, packed.integers)}),
    "fp8": _Kind(VLLM, {"": _Form(WHICH, packed.float8)}),
    "mxfp4": _Kind(VLLM, {"": _Form(WHICH, packed.float4)}),
    "nvfp4": _Kind(VLLM, {"": _Form(NVFP4, packed.nv_float4)}),
    "gguf": _Kind(LLAMA_CPP, {"": _Form(GGUF, _gguf)}),
    "wint2": _Kind(FASTDEPLOY, {"": _Form(WINT2_PACKED, packed.wint2), FASTDEPLOY: _Form(WINT2, _wint2_container)}),
    "w4a8": _Kind(FASTDEPLOY, {"": _Form(W4A8, _w4a8)}, by_text=True),
}
