"""config.json in compressed-tensors' words: groups of layers by patterns, and the way back. WINT2, which it has no words for,
stands beside the groups (_wint2.py), under a quant_method that is not compressed-tensors' own.

vllm-project/compressed-tensors (quantization/quant_config.py), vllm-project/vllm
(model_executor/layers/quantization/compressed_tensors).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import BLOCK, COMPRESSED_TENSORS, Float8Block
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.errors import ConfigError
from ernie_quant.names import EXPERT_ROLES
from ernie_quant.runtimes import Linear, _float4, _modules, _w4afp8
from ernie_quant.runtimes import _wint2 as wint2
from ernie_quant.runtimes._patterns import covers

# blocks of weights, and what kernels do to the activations that they meet (vllm, compressed_tensors_w8a8_fp8.py)
FLOAT8 = {
    "weights": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": [BLOCK, BLOCK],
        "dynamic": False,
    },
    "input_activations": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": BLOCK,
        "dynamic": True,
    },
}
PACKED, MIXED = "pack-quantized", "mixed-precision"
BESIDE = (KEEP.form, ConvolutionalCode.form)  # no groups


def config(linears: Sequence[Linear]) -> dict[str, Any]:
    """quantization_config of a checkpoint of packed codes, float8 blocks or WINT2, under every name that a program looks up."""
    forms: dict[str, list[Linear]] = defaultdict(list)
    for linear in linears:
        forms[linear.codec.form].append(linear)
    regexes = _regexes(forms, _modules.names(linears))
    groups = sorted((form for form in forms if form not in BESIDE), key=lambda form: _place(forms[form]))
    return {
        **_method(regexes.get(ConvolutionalCode.form)),
        "format": _format(_scheme(forms[groups[0]][0].codec)["format"]) if groups else PACKED,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *regexes.get(KEEP.form, [])],
        "config_groups": {
            f"group_{i}": {"targets": [*regexes[form], *_kinds(forms[form])], **_scheme(forms[form][0].codec)}
            for i, form in enumerate(groups)
        },
    }


def _place(linears: Sequence[Linear]) -> tuple[bool, bool, str]:
    """Which group comes first: one of routed experts, of those one of integers, whose format is that of all then.

    SGLang has integers as experts only where the format of all is that of integers (compressed_tensors_wNa16_moe.py).
    """
    codec, routed = linears[0].codec, _routed(linears)
    return not routed, routed and _scheme(codec)["format"] != PACKED, codec.form


def _format(first: str) -> str:
    """Of all groups; vLLM and transformers ask it of none that says its own.

    SGLang takes all experts for MXFP4 where it says so (compressed_tensors.py, _is_mxfp4_moe), but its loaders of ERNIE know no
    `weight_packed` of these: that of VL models would leave them random with a warning. As it is the model is refused.
    """
    return MIXED if first == _float4.MXFP4 else first


def _kinds(linears: Sequence[Linear]) -> list[str]:
    """Classes of modules beside the names, by which no layer is looked up that has one of these or is ignored.

    SGLang reads the group of W4AFP8 under this one (compressed_tensors_w4a8_fp8_moe.py).
    """
    return ["Linear"] if _routed(linears) and isinstance(linears[0].codec, Weight4Float8) else []


def _method(targets: Sequence[str] | None) -> dict[str, Any]:
    """Whose words these are; with the `targets` of WINT2, if there are any."""
    if targets is None:
        return {"quant_method": COMPRESSED_TENSORS}
    return {"quant_method": wint2.METHOD, "version": wint2.VERSION, wint2.KEY: wint2.entry(targets)}


def _routed(linears: Sequence[Linear]) -> bool:
    """transformers decodes routed experts by the first group that has "experts" in a target, and `shared_experts` has it too

    (integrations/compressed_tensors.py, get_experts_scheme).
    """
    return any(li.role in EXPERT_ROLES for li in linears)


def _regexes(forms: Mapping[str, Sequence[Linear]], names: Mapping[str, _modules.Names]) -> dict[str, list[str]]:
    """`re:` patterns for the linears of each form, whatever prefix a program has for their names."""
    asked = {form: [name for li in members for name in names[li.name].asked(li.codec)] for form, members in forms.items()}
    nobodys = [name for form, members in forms.items() if form != KEEP.form for li in members for name in names[li.name].whole]
    patterns = covers({**asked, "": nobodys})
    return {form: [f"re:.*{pattern.removeprefix('model')}$" for pattern in patterns[form]] for form in forms}


def _scheme(codec: Codec) -> dict[str, Any]:
    """A group without its targets. `format` stands in each: vLLM has no fallback to the global one."""
    if isinstance(codec, Float8Block):
        return {"format": "float-quantized", **FLOAT8}
    if isinstance(codec, _float4.FORMS):
        return _float4.scheme(codec)
    assert isinstance(codec, RoundToNearest), codec
    per_channel = codec.group_size == CHANNEL
    weights = {
        "num_bits": codec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if per_channel else "group",
        **({} if per_channel else {"group_size": codec.group_size}),
        "dynamic": False,
    }
    inputs = {"input_activations": _w4afp8.INPUTS} if isinstance(codec, Weight4Float8) else {}
    return {"format": PACKED, "weights": weights, **inputs}


def codecs_of(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Codec]:
    """The codec that it promises for each layer. Raises ConfigError."""
    try:
        groups = [
            (_compiled(g["targets"]), _codec(g["weights"], g.get("input_activations"))) for g in config["config_groups"].values()
        ]
        if config["quant_method"] == wint2.METHOD:
            groups.append((_compiled(wint2.targets_of(config)), ConvolutionalCode()))
        ignore = _compiled(config["ignore"])
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ConfigError(f"config.json: quantization_config is none that this tool writes ({error!r:.100})") from None
    chosen: dict[str, Codec] = {}
    for module in modules:
        codecs = [codec for targets, codec in groups if targets.match(module)]
        ignored = ignore.match(module) is not None
        if len(codecs) + ignored != 1:
            raise ConfigError(f"config.json: {module} matches {len(codecs)} of config_groups, and ignore: {ignored}")
        chosen[module] = codecs[0] if codecs else KEEP
    return chosen


def _compiled(patterns: Sequence[str]) -> re.Pattern[str]:
    """One for all of them."""
    return re.compile(
        "|".join(f"(?:{p.removeprefix('re:') if p.startswith('re:') else re.escape(p) + '$'})" for p in patterns) or "(?!)"
    )


def _codec(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Codec:
    if weights == FLOAT8["weights"]:
        return Float8Block(COMPRESSED_TENSORS)
    if (found := _float4.codec_of(weights, inputs)) is not None:
        return found
    if weights["type"] != "int":
        raise ValueError(f"weights of type {weights['type']}, {weights['strategy']}")
    if inputs is not None:
        if inputs != _w4afp8.INPUTS:
            raise ValueError(f"integers for inputs in {inputs}")
        return Weight4Float8(weights["num_bits"], weights.get("group_size", CHANNEL))
    return RoundToNearest(weights["num_bits"], CHANNEL if weights["strategy"] == "channel" else weights["group_size"])
