"""config.json in compressed-tensors' words: groups of layers by patterns, and the way back.

vllm-project/compressed-tensors (quantization/quant_config.py), vllm-project/vllm
(model_executor/layers/quantization/compressed_tensors).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ConfigError
from ernie_quant.names import EXPERT, EXPERT_ROLES, VISION_EXPERT
from ernie_quant.runtimes import Linear
from ernie_quant.runtimes._patterns import cover


def config(linears: Sequence[Linear]) -> dict[str, Any]:
    """quantization_config of a checkpoint with integer codes."""
    quantized = [li for li in linears if not isinstance(li.codec, Keep)]
    kept = [li for li in linears if isinstance(li.codec, Keep)]
    schemes: dict[tuple[int, int | str], list[Linear]] = defaultdict(list)
    for linear in quantized:
        assert isinstance(linear.codec, RoundToNearest)
        schemes[linear.codec.bits, linear.codec.group_size].append(linear)
    scheme_of = {li.name: scheme for scheme, members in schemes.items() for li in members}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *_regexes(kept, quantized), *_vl_routers(linears)],
        "config_groups": {
            f"group_{i}": {
                "format": "pack-quantized",  # no fallback to the global one
                "targets": _regexes(members, [li for li in linears if scheme_of.get(li.name) != (bits, group)]),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if group == CHANNEL else "group",
                    **({} if group == CHANNEL else {"group_size": group}),
                    "dynamic": False,
                },
            }
            for i, ((bits, group), members) in enumerate(sorted(schemes.items(), key=str))
        },
    }


def _regexes(chosen: Sequence[Linear], others: Sequence[Linear]) -> list[str]:
    """`re:` patterns for layers, under their names in the file and in vLLM."""
    covering = cover([li.module for li in chosen], [li.module for li in others])
    roles, rest = {li.role for li in chosen}, {li.role for li in others}
    patterns = []
    for pattern in covering:
        # vLLM keeps the experts of VL models as text_experts and vision_experts, numbered from 0 each
        if r"\.experts\.\d+\." in pattern:
            pattern = pattern.replace(r"\.experts\.", r"\.(?:text_|vision_)?experts\.")
        elif r"\.experts\." in pattern and (both := roles & set(EXPERT_ROLES)) and not both & rest:
            own = "|".join("text" if role == EXPERT else "vision" for role in sorted(both))
            pattern = re.sub(r"experts(\\\.\(\?:[\d|]+\))", rf"(?:experts\1|(?:{own})_experts\\.\\d+)", pattern)
        patterns.append(f"re:.*{pattern.removeprefix('model')}$")
    return list(dict.fromkeys(patterns))


def _vl_routers(linears: Sequence[Linear]) -> list[str]:
    """vLLM's own names of the routers of VL models."""
    return [r"re:.*\.(?:text|vision)_experts_gate$"] if any(li.role == VISION_EXPERT for li in linears) else []


def codecs_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Codec]:
    """The codec that it promises for each linear. Raises ConfigError."""
    try:
        groups = [(_compiled(g["targets"]), _codec(g["weights"])) for g in config["config_groups"].values()]
        ignore = _compiled(config["ignore"])
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ConfigError(f"config.json: quantization_config is none that this tool writes ({error!r:.100})") from None
    chosen: dict[str, Codec] = {}
    for name in names:
        module = name.removesuffix(".weight")
        codecs = [codec for targets, codec in groups if any(t.match(module) for t in targets)]
        ignored = any(i.match(module) for i in ignore)
        if len(codecs) + ignored != 1:
            raise ConfigError(f"config.json: {module} matches {len(codecs)} of config_groups, and ignore: {ignored}")
        chosen[name] = codecs[0] if codecs else KEEP
    return chosen


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(p.removeprefix("re:") if p.startswith("re:") else re.escape(p) + "$") for p in patterns]


def _codec(weights: Mapping[str, Any]) -> Codec:
    return RoundToNearest(weights["num_bits"], CHANNEL if weights["strategy"] == "channel" else weights["group_size"])
