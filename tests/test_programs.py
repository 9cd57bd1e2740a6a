"""Every program that loads a file finds the form of every layer in config.json, whatever it calls the layer.

`helpers.programs` rewrites how vLLM, transformers and SGLang look layers up; the real ones run in `test_transformers.py` and in
`tests/vllm`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import programs
from helpers.models import FAMILIES, random_model
from helpers.programs import KEPT
from helpers.results import WIDTHS
from helpers.runs import everything

from ernie_quant import names
from ernie_quant.codecs import Codec, of_text
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.errors import PlanError
from ernie_quant.planning import recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.planning.steps import Plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

INT4, INT8 = RoundToNearest(4, 128), RoundToNearest(8, CHANNEL)


def rules(*pairs: tuple[str, Codec]) -> Recipe:
    """First match wins; what nothing matches is kept."""
    return Recipe("test", tuple(RecipeRule(codec, match=match, optional=True) for match, codec in pairs))


def uniform(codec: Codec) -> dict[str, Recipe]:
    word = codec.describe()
    return {
        f"{word}, {which}": everything(codec, experts_only=experts_only, mtp=mtp)
        for which, experts_only, mtp in (("all", False, False), ("all and MTP", False, True), ("experts", True, False))
    }


RECIPES = {
    **uniform(INT4), **uniform(RoundToNearest(4, 64)), **uniform(RoundToNearest(4, 32)), **uniform(RoundToNearest(4, CHANNEL)),
    **uniform(RoundToNearest(8, 128)), **uniform(Float8Block()), **uniform(Float4Group()), **uniform(NvFloat4()),
    "fp4 inputs": rules((r"mtp", NvFloat4()), (r"proj", NvFloat4Inputs())),
    "fp4 inputs of experts": rules((r"\.experts\.", NvFloat4Inputs()), (r"self_attn", NvFloat4()), (r"mtp|proj", INT4)),
    "MTP alone": rules((r"mtp_block", INT8)),
    "float4 beside int4 of the same group": rules((r"\.experts\.", Float4Group()), (r"mtp|proj", RoundToNearest(4, 32))),
    "attention for fp8 inputs": rules((r"self_attn", Weight4Float8()), (r"mtp|proj", INT4)),
    "MTP in fp8 alone": rules((r"mtp_block", Float8Block())),
    "attention alone": rules((r"self_attn", INT8)),
    "shared experts in 8 bits": rules((r"shared_experts", INT8), (r"\.experts\.", INT4)),
    "routed experts in 8 bits": rules((r"\.experts\.", INT8), (r"shared_experts", INT4)),
    "shared experts alone": rules((r"shared_experts", INT4)),
    "layers of other bits": rules((r"layers\.1\..*\.experts\.", INT8), (r"\.experts\.", INT4), (r"self_attn", INT8)),
    "experts of layer 1 kept": rules((r"layers\.1\..*\.experts\.", KEEP), (r"mtp|proj", INT4)),
    "experts of layer 1 kept, fp8": rules((r"layers\.1\..*\.experts\.", KEEP), (r"mtp|proj", Float8Block())),
    "first layer kept": rules((r"layers\.0\.", KEEP), (r"proj", INT4)),
    "first layer kept, fp8": rules((r"layers\.0\.", KEEP), (r"proj", Float8Block())),
    "text experts alone": Recipe("test", (RecipeRule(INT4, (names.EXPERT,)),)),
    "vision experts alone": Recipe("test", (RecipeRule(INT4, (names.VISION_EXPERT,), optional=True),)),
    "vision experts in fp8": Recipe("test", (RecipeRule(Float8Block(), (names.VISION_EXPERT,), optional=True),)),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, in widths that blocks of 128 divide, with three MoE layers where there are experts."""
    root = tmp_path_factory.mktemp("sources")
    return {family: random_model(root / family, layouts.PT, family, **WIDTHS[family]) for family in FAMILIES}


def wanted(codec: Codec) -> str | tuple[object, ...]:
    match codec:
        case Keep():
            return KEPT
        case Weight4Float8():
            return ("pack-quantized", "int", 4, 128, "float8 inputs")
        case RoundToNearest(bits=bits, group_size=group):
            return ("pack-quantized", "int", bits, group)
        case Float4Group():
            return ("mxfp4-pack-quantized", "float", 4, 32)
        case NvFloat4Inputs():
            return ("nvfp4-pack-quantized", "float", 4, 16, "float4 inputs")
        case NvFloat4():
            return ("nvfp4-pack-quantized", "float", 4, 16)
        case Float8Block(quant_method="fp8"):
            return "fp8"
    return ("float-quantized", "float", 8, (128, 128))


def found(read: str) -> str | tuple[object, ...]:
    """What a program took a module for, as `wanted` says it."""
    if not read.startswith("{"):
        return read
    scheme = json.loads(read)
    size = scheme.get("group_size")
    group = {"channel": CHANNEL, "group": size, "tensor_group": size, "block": tuple(scheme.get("block_structure", ()))}
    inputs = scheme["inputs"] if scheme["format"].endswith("pack-quantized") else None  # float8 blocks always have them
    of_inputs = () if inputs is None else (f"{inputs['type']}{inputs['num_bits']} inputs",)
    return (scheme["format"], scheme["type"], scheme["num_bits"], group[scheme["strategy"]], *of_inputs)


def misread(plan: Plan, entry: dict[str, Any]) -> Iterator[str]:
    """Modules that a program would load in another form than the plan stores them in."""
    layers = [s for s in plan.steps if names.is_layer(s.name, s.role, s.spec.shape)]
    stored = {s.name.removesuffix(".weight"): wanted(s.codec) for s in layers}
    vl = any(s.role == names.VISION_EXPERT for s in layers)
    text_experts = 1 + max(int(re.findall(r"experts\.(\d+)", s.name)[0]) for s in layers if s.role == names.EXPERT) if vl else 0
    for program in programs.programs(list(stored), text_experts):
        for module in program.modules:
            truth = {stored[part] for part in module.parts}
            if module.experts and program.name == "transformers" and KEPT in truth:
                continue  # plain tensors are loaded as such there, and config.json is not asked
            if (said := found(programs.read(entry, module, program))) not in truth or len(truth) > 1:
                yield f"{program.name}: {module.name} is {said}, stored as {truth}"


def planned(source: Path, rules: recipe.Recipe) -> Plan:
    checkpoint, known = open_source(source), {}
    if needs := {need for rule in rules.rules for need in of_text(rule.codec)}:  # nobody reads what it says
        steps = make_plan(checkpoint, runtime="vllm").steps
        known = {step.name: dict.fromkeys(needs, step.view) for step in steps}
    return make_plan(checkpoint, runtime="vllm", recipe=rules, statistics=known)


@pytest.mark.parametrize("rules", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_reads_what_is_stored(family: str, rules: str, sources: dict[str, Path]) -> None:
    if family == "dense" and (rules.endswith(", experts") or rules == "text experts alone"):
        with pytest.raises(PlanError, match="cannot be done as asked"):
            planned(sources[family], RECIPES[rules])
        return
    if family == "vl" and rules.startswith("fp4 inputs"):
        with pytest.raises(PlanError, match="fp4 inputs are for text models"):
            planned(sources[family], RECIPES[rules])
        return
    plan = planned(sources[family], RECIPES[rules])
    if "quantization_config" not in plan.config:
        assert all(isinstance(s.codec, Keep) for s in plan.steps)
        return
    entry = json.loads(json.dumps(plan.config["quantization_config"]))
    # transformers has one scheme for all experts by itself; of other plans it is said that they need our import
    one_scheme = len({s.codec for s in plan.steps if s.role in names.EXPERT_ROLES} - {KEEP}) < 2
    assert [line for line in misread(plan, entry) if one_scheme or not line.startswith("transformers")] == []


def without_the_drafts_names(entry: dict[str, Any]) -> None:
    kept = entry["modules_to_not_convert"]
    last = 1 + max(int(m[1]) for k in kept if (m := re.search(r"layers\.(\d+)\.mlp\.gate$", k)))
    kept[:] = [k for k in kept if f".layers.{last}." not in k]


def any_layer_is_targeted(entry: dict[str, Any]) -> None:
    group = entry["config_groups"]["group_0"]
    group["targets"] = [re.sub(r"layers\\\.(\d|\(\?:[\d|]+\))", r"layers\\.\\d+", t) for t in group["targets"]]
    entry["ignore"] = [i for i in entry["ignore"] if not re.search(r"layers\\\.\d", i)]


def shared_experts_first(entry: dict[str, Any]) -> None:
    entry["config_groups"] = dict(reversed(entry["config_groups"].items()))


def without_fused_names(entry: dict[str, Any]) -> None:
    for patterns in (entry["ignore"], *(g["targets"] for g in entry["config_groups"].values())):
        patterns[:] = [re.sub(r"\b(qkv|gate_up)\||\|(qkv|gate_up)\b|(?<=attn\\\.)qkv_proj", "", p) for p in patterns]


def without_the_routers(entry: dict[str, Any]) -> None:
    entry["ignore"] = [i for i in entry["ignore"] if "experts_gate" not in i]


def without_the_experts_own_modules(entry: dict[str, Any]) -> None:
    group = entry["config_groups"]["group_0"]
    group["targets"] = [t for t in group["targets"] if "text_experts" not in t and "vision_experts" not in t]


# what this tool wrote once, and what happened in the real program
INT4_ALL, INT4_EXPERTS, FP8_ALL = "int4, group 128, mse, all", "int4, group 128, mse, experts", "fp8, blocks 128x128, all"
FAULTS = {
    "the draft is cast to float8": ("moe_mtp", FP8_ALL, without_the_drafts_names, "vLLM's draft"),
    "the draft has no such weights": ("moe_mtp", INT4_ALL, any_layer_is_targeted, "vLLM's draft"),
    "routed experts decoded as shared ones": ("moe", "shared experts in 8 bits", shared_experts_first, "transformers"),
    "nothing names fused layers": ("vl", INT4_ALL, without_fused_names, "SGLang"),
    "nothing names the routers": ("vl", INT4_EXPERTS, without_the_routers, "SGLang"),
    "a KeyError on text_experts": ("vl", INT4_EXPERTS, without_the_experts_own_modules, "vLLM"),
}


@pytest.mark.parametrize(("family", "rules", "fault", "program"), FAULTS.values(), ids=FAULTS)
def test_an_old_fault_would_be_found(
    family: str, rules: str, fault: Callable[[dict[str, Any]], None], program: str, sources: dict[str, Path]
) -> None:
    plan = planned(sources[family], RECIPES[rules])
    entry = copy.deepcopy(plan.config["quantization_config"])
    fault(entry)
    assert json.dumps(entry) != json.dumps(plan.config["quantization_config"])
    assert [line for line in misread(plan, entry) if line.startswith(f"{program}: ")]


def test_fp8_of_a_vl_model_would_take_the_routers_along(sources: dict[str, Path]) -> None:
    """vLLM skips a layer whose name begins a kept one's: naming the routers keeps the experts, not naming them casts them."""
    plan = planned(sources["vl"], RECIPES[FP8_ALL])
    layers = [s for s in plan.steps if names.is_layer(s.name, s.role, s.spec.shape)]
    kept = [s.name.removesuffix(".weight") for s in layers if isinstance(s.codec, Keep)]
    gates = [k.replace(".gate", f".{kind}_experts_gate") for k in kept if k.endswith(".mlp.gate") for kind in ("text", "vision")]
    for listed, wrong in ((kept, "text_experts_gate is fp8"), (kept + gates, "text_experts is kept")):
        lines = list(misread(plan, {"quant_method": "fp8", "modules_to_not_convert": listed}))
        assert [line for line in lines if wrong in line], wrong
