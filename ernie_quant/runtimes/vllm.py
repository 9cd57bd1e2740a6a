"""vLLM: compressed-tensors `pack-quantized` for integers, `quant_method: fp8` for float8 blocks. transformers loads both.

Formats: vllm-project/compressed-tensors (compressors/pack_quantized), vllm-project/vllm
(model_executor/layers/quantization/compressed_tensors, .../fp8.py), huggingface/transformers (integrations/finegrained_fp8.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import BLOCK, Float8Block
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ConfigError
from ernie_quant.names import EXPERT, VISION_EXPERT
from ernie_quant.runtimes import Linear
from ernie_quant.runtimes._patterns import cover

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

LAYOUT = "pt"
ROWS = 1
CONFIG: dict[str, Any] = {}
CODECS = (Keep, RoundToNearest, Float8Block)
BITS, GROUPS = (4, 8), (32, 64, 128, CHANNEL)  # what Marlin takes
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_scale_inv", "weight")
EXPERTS = (EXPERT, VISION_EXPERT)


def folder(role: str) -> str:
    """All in one."""
    return ""


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """Nothing that could be written all the same."""
    return []


def parts(name: str, codec: Codec, spec: TensorSpec) -> dict[str, TensorSpec]:
    """Stored tensors of the weight `name`."""
    module = name.removesuffix(".weight")
    match codec:
        case RoundToNearest(bits=bits):
            out, width = spec.shape
            return {
                f"{module}.weight_packed": TensorSpec((out, -(-width * bits // 32)), "I32"),
                f"{module}.weight_scale": codec.specs(spec)["scale"],
                f"{module}.weight_shape": TensorSpec((2,), "I64"),
            }
        case Float8Block():
            fields = codec.specs(spec)
            return {f"{module}.weight": fields["codes"], f"{module}.weight_scale_inv": fields["scale"]}
    assert isinstance(codec, Keep), codec
    return {name: spec}


def constants(name: str, codec: Codec, spec: TensorSpec) -> dict[str, torch.Tensor]:
    """`weight_shape`: the [out, in] that packing hides."""
    import torch

    module = name.removesuffix(".weight")
    if isinstance(codec, RoundToNearest):
        return {f"{module}.weight_shape": torch.tensor(spec.shape, dtype=torch.int64)}
    return {}


def pack(name: str, codec: Codec, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Stored tensors of a slab of rows."""
    from ernie_quant.kernels import packing

    module = name.removesuffix(".weight")
    match codec:
        case RoundToNearest(bits=bits):
            return {
                f"{module}.weight_packed": packing.pack(encoded["codes"], bits),
                f"{module}.weight_scale": encoded["scale"],
            }
        case Float8Block():
            return {f"{module}.weight": encoded["codes"], f"{module}.weight_scale_inv": encoded["scale"]}
    return {name: encoded["weight"]}


def unpack(name: str, codec: Codec, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """What was encoded, from the stored tensors of a slab of rows."""
    from ernie_quant.kernels import packing

    module = name.removesuffix(".weight")
    match codec:
        case RoundToNearest(bits=bits):
            columns = int(stored[f"{module}.weight_shape"][1])
            codes = packing.unpack(stored[f"{module}.weight_packed"], bits, columns)
            return {"codes": codes, "scale": stored[f"{module}.weight_scale"]}
        case Float8Block():
            return {"codes": stored[f"{module}.weight"], "scale": stored[f"{module}.weight_scale_inv"]}
    return {"weight": stored[name]}


def weight_of(name: str) -> tuple[str, str]:
    """`….up_proj.weight_packed` -> (`….up_proj.weight`, `weight_packed`)."""
    module, _, part = name.rpartition(".")
    return (f"{module}.weight", part) if part in PARTS else (name, part)


def problems(linears: Sequence[Linear]) -> list[str]:
    """Forms that vLLM has no kernel for, and layers whose parts differ."""
    found = [
        f"{li.name}: vLLM loads int4 and int8 in groups of 32, 64, 128 or per channel, not {li.codec.describe()};"
        " --runtime transformers takes it"
        for li in linears
        if isinstance(li.codec, RoundToNearest) and (li.codec.bits not in BITS or li.codec.group_size not in GROUPS)
    ]
    return found + unknown(linears) + mixed(linears)


def unknown(linears: Sequence[Linear]) -> list[str]:
    """Codecs of other runtimes."""
    return [
        f"{li.name}: cannot be written for this runtime as {li.codec.describe()}"
        for li in linears
        if not isinstance(li.codec, CODECS)
    ]


def notes(linears: Sequence[Linear]) -> list[str]:
    """Widths that load, but for which vLLM's fast kernels are not made."""
    narrow = {
        li.spec.shape[1] for li in linears if isinstance(li.codec, RoundToNearest) and not _rows(li) and li.spec.shape[1] % 128
    }
    return [f"vLLM's Marlin kernels want hidden_size to be a multiple of 128, this one's is {n}" for n in sorted(narrow)]


def _rows(linear: Linear) -> bool:
    """Is the layer split along its inputs under tensor parallelism?"""
    return linear.module.endswith((".down_proj", ".o_proj"))


def layer_of(name: str, role: str) -> str:
    """qkv_proj, gate_up_proj, or all experts of a layer."""
    module = name.removesuffix(".weight")
    if role in EXPERTS:
        return re.sub(r"experts\.\d+\.\w+$", role, module)
    return re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", re.sub(r"\.(q|k|v)_proj$", ".qkv_proj", module))


def mixed(linears: Sequence[Linear]) -> list[str]:
    """Layers that are one module in memory but would be stored in several forms."""
    kinds = {type(li.codec) for li in linears} - {Keep}
    found = ["fp8 and integer codes cannot stand in one checkpoint: no config.json says both"] if len(kinds) > 1 else []
    modules: dict[str, set[str]] = defaultdict(set)
    for linear in linears:
        modules[layer_of(linear.name, linear.role)].add(_form(linear.codec))
    return found + [
        f"{module}: is one layer in memory, but would be stored as {' and '.join(sorted(forms))}"
        for module, forms in modules.items()
        if len(forms) > 1
    ]


def mixed_experts(linears: Sequence[Linear]) -> list[str]:
    """transformers 5 takes the first group of config.json that names experts for those of all layers, silently.

    (integrations/compressed_tensors.py; seen with 5.23: layers of another width were decoded wrongly.)
    """
    forms = sorted({_form(li.codec) for li in linears if li.role in EXPERTS})
    return [f"experts: would be stored as {' and '.join(forms)}, of which transformers reads one only"] if len(forms) > 1 else []


def _form(codec: Codec) -> str:
    """What a file shows of a codec: not the way in which a scale was chosen."""
    return re.sub(r", (mse|absmax)$", "", codec.describe())


def quantization_config(linears: Sequence[Linear]) -> dict[str, Any] | None:
    """The entry of config.json, derived from what is written."""
    quantized = [li for li in linears if not isinstance(li.codec, Keep)]
    kept = [li for li in linears if isinstance(li.codec, Keep)]
    if not quantized:
        return None
    if isinstance(quantized[0].codec, Float8Block):
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [li.module for li in kept],
        }
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
    found = cover([li.module for li in chosen], [li.module for li in others])
    roles, rest = {li.role for li in chosen}, {li.role for li in others}
    patterns = []
    for pattern in found:
        # vLLM keeps the experts of VL models as text_experts and vision_experts, numbered from 0 each
        if r"\.experts\.\d+\." in pattern:
            pattern = pattern.replace(r"\.experts\.", r"\.(?:text_|vision_)?experts\.")
        elif r"\.experts\." in pattern and (both := roles & set(EXPERTS)) and not both & rest:
            own = "|".join("text" if role == EXPERT else "vision" for role in sorted(both))
            pattern = re.sub(r"experts(\\\.\(\?:[\d|]+\))", rf"(?:experts\1|(?:{own})_experts\\.\\d+)", pattern)
        patterns.append(f"re:.*{pattern.removeprefix('model')}$")
    return list(dict.fromkeys(patterns))


def _vl_routers(linears: Sequence[Linear]) -> list[str]:
    """vLLM's own names of the routers of VL models."""
    return [r"re:.*\.(?:text|vision)_experts_gate$"] if any(li.role == VISION_EXPERT for li in linears) else []


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """The codec that `quantization_config` promises for each linear (PT name, [out, in]). Raises ConfigError."""
    if config.get("quant_method") == "fp8":
        kept = set(config.get("modules_to_not_convert", ()))
        return {name: KEEP if name.removesuffix(".weight") in kept else Float8Block() for name, _ in linears}
    if config.get("quant_method") != "compressed-tensors":
        raise ConfigError(f"config.json: quant_method {config.get('quant_method')!r} is none that this tool writes")
    try:
        groups = [(_compiled(g["targets"]), _codec(g["weights"])) for g in config["config_groups"].values()]
        ignore = _compiled(config["ignore"])
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ConfigError(f"config.json: quantization_config is none that this tool writes ({error!r:.100})") from None
    found: dict[str, Codec] = {}
    for name, _ in linears:
        module = name.removesuffix(".weight")
        codecs = [codec for targets, codec in groups if any(t.match(module) for t in targets)]
        ignored = any(i.match(module) for i in ignore)
        if len(codecs) + ignored != 1:
            raise ConfigError(f"config.json: {module} matches {len(codecs)} of config_groups, and ignore: {ignored}")
        found[name] = codecs[0] if codecs else KEEP
    return found


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(p.removeprefix("re:") if p.startswith("re:") else re.escape(p) + "$") for p in patterns]


def _codec(weights: Mapping[str, Any]) -> Codec:
    return RoundToNearest(weights["num_bits"], CHANNEL if weights["strategy"] == "channel" else weights["group_size"])


def tp_sizes(linears: Sequence[Linear], dims: Mapping[str, int], heads: int) -> list[int]:
    """Tensor-parallel sizes, powers of two, that heads, widths and groups allow."""
    kv_heads = dims["kv_heads"]
    sizes = []
    for tp in (1, 2, 4, 8, 16):
        splits_heads = heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
        if splits_heads and all(_splits(linear, tp) for linear in linears):
            sizes.append(tp)
    return sizes


def _splits(linear: Linear, tp: int) -> bool:
    out, width = linear.spec.shape
    rows = _rows(linear)
    share, rest = divmod(width if rows else out, tp)
    match linear.codec:
        case RoundToNearest(group_size=group) if rows and group != CHANNEL:
            return rest == 0 and share % max(int(group), 64) == 0
        case RoundToNearest():
            return rest == 0 and share % 64 == 0  # Marlin's tile
        case Float8Block():
            return rest == 0 and share % BLOCK == 0
    return rest == 0


def commands(out: Path, config: Mapping[str, Any], tp: Sequence[int]) -> list[tuple[str, str]]:
    """How to run it."""
    vl = "text_config" in config or "vision_config" in config
    most = f"   # or {', '.join(map(str, tp[1:]))}" if len(tp) > 1 else ""
    trust = " --trust-remote-code" if vl else ""
    runs = [("vLLM", f"vllm serve {out} --tensor-parallel-size {tp[0] if tp else 1}{trust}{most}")]
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    if not vl and sum(any("experts" in t for t in g["targets"] if "shared" not in t) for g in groups) < 2:  # see mixed_experts
        snippet = f"from transformers import pipeline; print(pipeline('text-generation', '{out}')('Hello', max_new_tokens=20))"
        runs.append(("transformers", f'python -c "{snippet}"'))
    return runs
