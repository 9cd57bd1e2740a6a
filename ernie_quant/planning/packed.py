"""The recipes of PT checkpoints for vLLM and transformers: one codec for the experts, or for every linear; and for those of
2-bit models, in both layouts, what of the experts has how many bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ernie_quant.errors import PlanError

if TYPE_CHECKING:
    from ernie_quant.codecs import Codec
    from ernie_quant.planning.recipe import Recipe, RecipeRule

MOST_LAYERS = 1000
ACTIVATIONS = ("bf16", "fp8")  # what vLLM multiplies int4 with: inputs as they are, or rounded
FLOAT4_ACTIVATIONS = ("bf16", "fp4")  # what it multiplies NVFP4 with


def one_codec(name: str, codec: Codec, *, experts_only: bool, mtp: bool, keep_unfit: bool) -> Recipe:
    """One codec for the experts, or for every quantizable linear; with `mtp` for those of the MTP block too."""
    from ernie_quant.names import EXPERT_ROLES, MTP, QUANTIZABLE, ROLES
    from ernie_quant.planning.recipe import Recipe, RecipeRule

    roles = EXPERT_ROLES if experts_only else tuple(r for r in ROLES if r in QUANTIZABLE and (r != MTP or mtp))
    hint = "this model has no experts; without --experts-only its other linears are quantized"
    rules = [RecipeRule(codec, roles, if_unused=hint if experts_only else "")]
    if experts_only and mtp:
        rules.append(RecipeRule(codec, (MTP,), optional=True))
    return Recipe(name, tuple(rules), keep_unfit)


def integers(name: str, *, group_size: int | str, scale: str, **which: bool) -> Recipe:
    """Codes of as many bits as the name says, in groups."""
    from ernie_quant import codecs

    settings = {"bits": int(name.removeprefix("wint")), "group_size": group_size, "scale": scale}
    return one_codec(name, codecs.make("rtn", settings), **which)


def wint4(name: str, *, activations: str, group_size: int | str, scale: str, **which: bool) -> Recipe:
    """`integers` for vLLM, which may round the inputs. Raises PlanError or ValueError."""
    from ernie_quant import codecs

    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}, not {' or '.join(ACTIVATIONS)}")
    if activations == ACTIVATIONS[0]:
        return integers(name, group_size=group_size, scale=scale, **which)
    if group_size != (only := codecs.make("w4afp8", {}).group_size):  # type: ignore[attr-defined]
        raise PlanError(f"{name}: activations fp8 goes with group_size {only} only, not {group_size}", [])
    return one_codec(name, codecs.make("w4afp8", {"scale": scale}), **which)


def float8(name: str, **which: bool) -> Recipe:
    """Blocks of 128 x 128."""
    from ernie_quant import codecs

    return one_codec(name, codecs.make("fp8", {}), **which)


def float4(name: str, **which: bool) -> Recipe:
    """MXFP4."""
    from ernie_quant import codecs

    return one_codec(name, codecs.make("mxfp4", {}), **which)


def nv_float4(name: str, *, activations: str, experts_only: bool, mtp: bool, keep_unfit: bool) -> Recipe:
    """NVFP4; with `activations` fp4 but for the MTP block, which no text runs through. Raises ValueError."""
    from ernie_quant import codecs
    from ernie_quant.names import MTP
    from ernie_quant.planning.recipe import RecipeRule

    if activations not in FLOAT4_ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}, not {' or '.join(FLOAT4_ACTIVATIONS)}")
    alone, rounds = codecs.make("nvfp4", {}), activations != FLOAT4_ACTIVATIONS[0]
    recipe = one_codec(
        name,
        codecs.make("w4a4", {}) if rounds else alone,
        experts_only=experts_only,
        mtp=mtp and not rounds,
        keep_unfit=keep_unfit,
    )
    return replace(recipe, rules=(*recipe.rules, RecipeRule(alone, (MTP,), optional=True))) if rounds and mtp else recipe


def wint2(
    name: str, *, wint4_layers: int, effort: int, group_size: int | str, scale: str, experts_only: bool, mtp: bool,
    keep_unfit: bool,
) -> Recipe:  # fmt: skip
    """WINT2 experts, int4 in groups for those of the first layers, int8 per channel for every other linear.

    Per channel, without the lowest code: FastDeploy's container holds that too.
    """
    from ernie_quant import codecs
    from ernie_quant.codecs.rtn import CHANNEL
    from ernie_quant.names import EXPERT_ROLES, MTP, QUANTIZABLE, ROLES
    from ernie_quant.planning.recipe import Recipe, RecipeRule

    channel = {"group_size": CHANNEL, "scale": scale, "full_range": False}
    int4 = codecs.make("rtn", {"bits": 4, **(channel if group_size == CHANNEL else {"group_size": group_size, "scale": scale})})
    int8 = codecs.make("rtn", {"bits": 8, **channel})
    hint = "this model has no experts; wint2 is for those that have"
    rules = two_forms(int4, wint4_layers, effort=effort, if_unused=hint, if_taken=none_left(wint4_layers, "wint4 --runtime vllm"))
    roles = () if experts_only else tuple(r for r in ROLES if r in QUANTIZABLE and r not in (*EXPERT_ROLES, MTP))
    roles += (MTP,) if mtp else ()
    return Recipe(name, (*rules, *([RecipeRule(int8, roles, optional=experts_only)] if roles else [])), keep_unfit)


def two_forms(
    wint4: Codec, wint4_layers: int, *, effort: int, if_unused: str, if_taken: str
) -> list[RecipeRule]:  # fmt: skip
    """Rules for experts: `wint4` for those of layers below `wint4_layers`, WINT2 for the others. Raises ValueError."""
    from ernie_quant import codecs
    from ernie_quant.names import EXPERT_ROLES
    from ernie_quant.planning.recipe import RecipeRule

    if not 0 <= wint4_layers <= MOST_LAYERS:
        raise ValueError(f"wint4_layers is {wint4_layers}, not a number of layers")
    below = rf"\.layers\.(?:{'|'.join(map(str, range(wint4_layers)))})\."
    first = [RecipeRule(wint4, EXPERT_ROLES, below, optional=True)] if wint4_layers else []
    return [*first, RecipeRule(codecs.make("ccq", {"effort": effort}), EXPERT_ROLES, if_unused=if_unused, if_taken=if_taken)]


def none_left(wint4_layers: int, instead: str) -> str:
    """What a user is told who asked for more WINT4 layers than there are, to be filled in with these."""
    return (
        f"wint2: wint4-layers is {wint4_layers}, which leaves no experts for 2 bits: the last of this model's {{layers}} MoE"
        f" layers is layer {{last}}; give at most {{last}}, or for all in 4 bits use {instead}"
    )
