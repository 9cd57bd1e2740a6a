"""How programs find out from config.json in which form a layer is stored, rewritten from their sources.

Each program is a list of modules (the name under which it asks, and the linears of the file that the module is made of) and
a way to match names. What was read: vllm-project/vllm 0.32 (model_executor/models/ernie45_moe.py, ernie45_vl.py,
ernie45_vl_moe.py, ernie_mtp.py; layers/quantization/compressed_tensors/utils.py, .../fp8.py, utils/quant_utils.py),
huggingface/transformers 5.24 (integrations/compressed_tensors.py, quantizers/quantizers_utils.py), vllm-project/
compressed-tensors 0.20 (utils/match.py), sgl-project/sglang 0.5 (srt/models/ernie4.py, ernie4_eagle.py, ernie45_moe_vl.py,
ernie45_vl.py; srt/layers/quantization/compressed_tensors/utils.py, fp8.py, utils.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
KEPT = "kept"


@dataclass(frozen=True)
class Module:
    """`name`: what the program calls it. `parts`: module names of the file. `experts`: it is a layer's routed experts."""

    name: str
    parts: tuple[str, ...]
    experts: bool = False


@dataclass(frozen=True)
class Program:
    """`packed`: what it says its fused layers are made of."""

    name: str
    modules: tuple[Module, ...]
    packed: Mapping[str, Sequence[str]]

    @property
    def sglang(self) -> bool:
        return self.name.startswith("SGLang")


# ---- modules -----------------------------------------------------------------------------------------------------------


def _ffn(name: str, file: str) -> Iterator[Module]:
    yield Module(f"{name}.gate_up_proj", (f"{file}.gate_proj", f"{file}.up_proj"))
    yield Module(f"{name}.down_proj", (f"{file}.down_proj",))


def _block(name: str, file: str, *, dense: bool) -> Iterator[Module]:
    attention = f"{file}.self_attn"
    yield Module(f"{name}.self_attn.qkv_proj", tuple(f"{attention}.{x}_proj" for x in "qkv"))
    yield Module(f"{name}.self_attn.o_proj", (f"{attention}.o_proj",))
    if dense:
        yield from _ffn(f"{name}.mlp", f"{file}.mlp")


def _experts(name: str, file: str, ids: Iterable[int]) -> Module:
    return Module(name, tuple(f"{file}.{i}.{x}_proj" for i in ids for x in ("gate", "up", "down")), experts=True)


def _numbers(pattern: str, linears: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for name in linears if (m := re.search(pattern, name))})


def _decoder(linears: Sequence[str], prefix: str, *, text_experts: int) -> Iterator[Module]:
    """The layers of the main model as vLLM and SGLang build them; `text_experts` of a VL model, 0 of a text model."""
    for i in _numbers(r"^model\.layers\.(\d+)\.", linears):
        name, file = f"{prefix}model.layers.{i}", f"model.layers.{i}"
        mine = [li for li in linears if li.startswith(f"{file}.")]
        ids = _numbers(r"\.experts\.(\d+)\.", mine)
        yield from _block(name, file, dense=not ids)
        if any(".shared_experts." in li for li in mine):
            yield from _ffn(f"{name}.mlp.shared_experts", f"{file}.mlp.shared_experts")
        if ids and not text_experts:
            yield _experts(f"{name}.mlp.experts", f"{file}.mlp.experts", ids)
        elif ids:
            for kind, some in (("text", ids[:text_experts]), ("vision", ids[text_experts:])):
                yield Module(f"{name}.mlp.{kind}_experts_gate", (f"{file}.mlp.gate",))
                yield _experts(f"{name}.mlp.{kind}_experts", f"{file}.mlp.experts", some)


def _vision(linears: Sequence[str], qkv: str) -> Iterator[Module]:
    for file in linears:
        if file.startswith("vision_model.blocks."):
            yield Module(file.replace(".attn.qkv", f".attn.{qkv}"), (file,))


def programs(linears: Sequence[str], text_experts: int) -> list[Program]:
    """Every program that loads this model, and every model that it builds: main and draft."""
    mtp = [li for li in linears if li.startswith("model.mtp_block.0.")]
    last, block = 1 + max(_numbers(r"^model\.layers\.(\d+)\.", linears)), "model.mtp_block.0"
    if text_experts:  # transformers by itself has no VL with packed experts
        vllm = (*_decoder(linears, "language_model.", text_experts=text_experts), *_vision(linears, "qkv"))
        sglang = (*_decoder(linears, "", text_experts=text_experts), *_vision(linears, "qkv_proj"))
        # vision_model is not renamed; the class of SGLang has no packed_modules_mapping
        return [Program("vLLM", vllm, PACKED), Program("SGLang", sglang, {})]
    main = tuple(_decoder(linears, "", text_experts=0))
    own = tuple(Module(li, (li,)) for li in linears if ".experts." not in li and not li.startswith("model.mtp_"))
    whole = tuple(module for module in main if module.experts)
    found = [
        Program("vLLM", main, PACKED),
        Program("transformers", own + whole, {}),
        Program("SGLang", main, PACKED),
    ]
    if mtp:
        vllm_draft = tuple(_block(f"model.layers.{last}", block, dense=True))
        sglang_draft = tuple(_block("model.mtp_block", block, dense=True))
        for packed in (PACKED, {}):  # the draft's class has no mapping; its quantization config may be the main model's
            found += [
                Program("vLLM's draft", vllm_draft, packed), Program("SGLang's draft", sglang_draft, packed),
            ]  # fmt: skip
    return found


# ---- matching ----------------------------------------------------------------------------------------------------------


def _matches(name: str, pattern: str, *, contains: bool = False) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern.lower() in name.lower() if contains else pattern == name


def _shards(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    head, _, last = name.rpartition(".")
    return [f"{head}.{shard}" for shard in packed[last]] if last in packed else [name]


def _said(group: Mapping[str, Any]) -> str:
    """What the group says of weights, their format and inputs."""
    return json.dumps(group["weights"] | {"format": group["format"], "inputs": group.get("input_activations")})


def _scheme(config: Mapping[str, Any], name: str, program: Program) -> str:
    """vllm and sglang, should_ignore_layer, then find_matched_target: the fused name itself, or all of its shards."""
    contains = program.sglang  # SGLang looks for plain names of `ignore` anywhere in a layer's
    for names in ([name], _shards(name, program.packed)):
        ignored = {any(_matches(n, p, contains=contains) for p in config["ignore"]) for n in names}
        if len(ignored) > 1:
            return f"refused: shards of {name} are of different schemes"
        if ignored == {True}:
            return KEPT
    for names in ([name], _shards(name, program.packed)):
        found = [
            next((g for g in config["config_groups"].values() if any(_matches(n, t) for t in g["targets"])), None) for n in names
        ]
        if all(found):
            return _said(found[0])  # type: ignore[arg-type]
    # compressed-tensors keeps it; vLLM up to 0.13 and SGLang raise "Unable to find matching target", later vLLM keeps it
    return KEPT if program.name == "transformers" else f"refused: nothing names {name}"


def _by_compressed_tensors(config: Mapping[str, Any], module: Module, program: Program) -> str:
    if not module.experts:
        return _scheme(config, module.name, program)
    if program.name == "transformers":  # get_experts_scheme: one for all layers, of the first group that says "experts"
        group = next((g for g in config["config_groups"].values() if any("experts" in t for t in g["targets"])), None)
        return _said(group) if group else KEPT
    # vllm, compressed_tensors_moe.py, get_moe_method: the projections of expert 0 speak for the layer
    found = {_scheme(config, f"{module.name}.0.{x}_proj", program) for x in ("gate", "up", "down")}
    if program.sglang and any(_matches(module.name, p, contains=True) for p in config["ignore"]) != (found == {KEPT}):
        return f"refused: {module.name} and its projections differ"  # compressed_tensors.py asks `ignore` about both
    return found.pop() if len(found) == 1 else f"refused: projections of {module.name} are of different schemes"


def _fp8_skipped(kept: Sequence[str], module: Module, program: Program) -> bool | str:
    name = module.name
    if program.name == "transformers":  # should_convert_module
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return any(re.match(rf"(?:{k}){boundary}", name) or name.endswith(k) for k in kept)
    last = name.rpartition(".")[2]
    if program.name == "vLLM":  # ernie45_vl.py, hf_to_vllm_mapper
        kept = [*kept, *(f"language_model.{k}" for k in kept)]
    if program.sglang:  # sglang: listed names with and without "model."
        kept = [f"{p}{k.removeprefix('model.')}" for k in kept for p in ("", "model.")]
    if last in program.packed and (program.sglang or name not in kept):
        skipped = {shard in kept for shard in _shards(name, program.packed)}
        return skipped.pop() if len(skipped) == 1 else f"refused: shards of {name} differ"
    if "experts" in name and not program.sglang:  # vllm, is_layer_skipped: a layer whose name begins a kept one's
        return any(name in k for k in kept if "experts" in k)
    return name in kept


def read(config: Mapping[str, Any], module: Module, program: Program) -> str:
    """What the program takes the module for: `kept`, a scheme, or why it refuses."""
    if config["quant_method"] == "compressed-tensors":
        return _by_compressed_tensors(config, module, program)
    skipped = _fp8_skipped(config["modules_to_not_convert"], module, program)
    return skipped if isinstance(skipped, str) else KEPT if skipped else "fp8"
