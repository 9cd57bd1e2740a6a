"""vLLM: compressed-tensors' packed forms for integers and float4, `quant_method: fp8` for float8 blocks, and WINT2 experts,
beside any of the packed forms, for the plug-in of this package (ernie_quant/serving). Names and bytes: _packed.py.

Float8 blocks of VL models are compressed-tensors `float-quantized`: vLLM's reader of `fp8` skips a layer whose name begins the
name of a kept one, and `text_experts` begins that of its router, `text_experts_gate` (quant_utils.py, is_layer_skipped).

vllm-project/vllm (model_executor/layers/quantization/compressed_tensors, .../fp8.py), huggingface/transformers
(integrations/finegrained_fp8.py).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import IN_MULTIPLE, ConvolutionalCode
from ernie_quant.codecs.fp8 import BLOCK, COMPRESSED_TENSORS, Float8Block
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.names import EXPERT_ROLES, IN, MTP, QUANTIZABLE, VISION_EXPERT
from ernie_quant.runtimes import About, Linear, Place, Spread, _advice, _commands, _modules
from ernie_quant.runtimes import _float4 as float4
from ernie_quant.runtimes import _packed as packed
from ernie_quant.runtimes import _promise as promise
from ernie_quant.runtimes import _usual as usual
from ernie_quant.runtimes import _w4afp8 as w4afp8
from ernie_quant.runtimes import _wint2 as wint2
from ernie_quant.runtimes._transformers import loads_alone
from ernie_quant.runtimes._values import EXPERTS, STAGES, TENSOR

LAYOUT, FORMAT = "pt", "safetensors"
ROWS = 1
CONFIG: dict[str, Any] = {}
RECIPES = ("pt", "wint4", "wint8", "fp8", "mxfp4", "nvfp4", "wint2")
VERSION = 2
TAGS = ("vllm",)
PROGRAM, PARALLEL, AT_LOAD = "vLLM", (TENSOR, EXPERTS, STAGES), {"fp8": "--quantization fp8"}
PER_RANK, SPLITS_VOCABULARY, QUANTIZES_VOCABULARY, CASTS = False, False, False, False
MORE_BITS_FIRST = False
CODECS = (Keep, RoundToNearest, Float8Block, Float4Group, NvFloat4, NvFloat4Inputs, Weight4Float8, ConvolutionalCode)
TILE = 64  # of a rank's outputs, and of the inputs of experts: what Marlin loads (vllm, marlin_utils.py)
DENSE_TILE = 128  # of a rank's inputs of other linears
BITS, GROUPS = (4, 8), (32, 64, 128, CHANNEL)  # what Marlin takes
parts, constants, pack, unpack, weight_of = packed.parts, packed.constants, packed.pack, packed.unpack, packed.weight_of
model_problems, stem, fallback, notes = usual.model_problems, usual.stem, usual.fallback, _advice.notes
quantization_config, codecs_of, misread = promise.quantization_config, promise.codecs_of, promise.misread


def folder(role: str) -> str:
    """All in one."""
    return ""


def kept_as(role: str, spec: TensorSpec, *, quantized: bool) -> str:
    """As it is."""
    return spec.dtype


def recognizes(config: Mapping[str, Any]) -> bool:
    """Integers as compressed-tensors, float8 as DeepSeek, WINT2 in words of its own."""
    return config.get("quant_method") in ("compressed-tensors", "fp8", wint2.METHOD)


def metadata(about: About) -> tuple[dict[str, Any], tuple[str, ...]]:
    """transformers refuses files without it."""
    return {"format": "pt"}, ()


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """Nothing that could be written all the same."""
    return []


def problems(linears: Sequence[Linear]) -> list[str]:
    """Forms that vLLM has no kernel for, and layers whose parts differ."""
    misfits = [
        f"{li.name}: vLLM loads int4 and int8 in groups of 32, 64, 128 or per channel, not {li.codec.describe()};"
        " --runtime transformers takes it"
        for li in linears
        if isinstance(li.codec, RoundToNearest) and (li.codec.bits not in BITS or li.codec.group_size not in GROUPS)
    ]
    misfits += [
        f"{li.name}: {li.codec.describe()} is for routed experts, which the plug-in for vLLM decodes; another codec, or keep it"
        for li in linears
        if isinstance(li.codec, ConvolutionalCode) and li.role not in EXPERT_ROLES
    ]
    return misfits + w4afp8.problems(linears) + float4.problems(linears) + unknown(linears) + mixed(linears)


def unknown(linears: Sequence[Linear]) -> list[str]:
    """Codecs of other runtimes."""
    return [
        f"{li.name}: cannot be written for this runtime as {li.codec.describe()}"
        for li in linears
        if not isinstance(li.codec, CODECS)
    ]


def layer_of(name: str, role: str) -> str:
    """qkv_proj, gate_up_proj, or all experts of a layer."""
    module = name.removesuffix(".weight")
    return re.sub(r"experts\.\d+\.\w+$", role, module) if role in EXPERT_ROLES else _modules.fused(module)


def one_scale(name: str) -> str:
    """qkv_proj, or the gate_up_proj of one expert: vLLM takes the global scale of one part for all.

    (compressed_tensors_moe_w4a4_nvfp4.py, schemes/compressed_tensors_w4a4_nvfp4.py, process_weights_after_loading.)
    """
    return _modules.fused(name.removesuffix(".weight"))


alike = layer_of


def candidates(role: str) -> tuple[Codec, ...]:
    """WINT2 for experts, integers, or the weight as it is; float8 blocks have the bytes of int8 and more of its error."""
    if role not in QUANTIZABLE or role == MTP:
        return (KEEP,)
    few = (ConvolutionalCode(),) if role in EXPERT_ROLES else ()
    return (*few, *(RoundToNearest(4, group) for group in (128, 64, 32)), RoundToNearest(8, CHANNEL), KEEP)


def suited(codec: Codec, roles: Collection[str]) -> Codec:
    """VL models have float8 blocks in compressed-tensors' words."""
    if isinstance(codec, Float8Block) and VISION_EXPERT in roles:
        return replace(codec, quant_method=COMPRESSED_TENSORS)
    return codec


def mixed(linears: Sequence[Linear]) -> list[str]:
    """Layers that are one module in memory but would be stored in several schemes."""
    misfits = []
    if len(promise.quant_methods(linears)) > 1:
        misfits = [f"fp8 and other codes cannot stand in one checkpoint, unless fp8 has quant_method = '{COMPRESSED_TENSORS}'"]
    modules: dict[str, set[str]] = defaultdict(set)
    for linear in linears:
        modules[layer_of(linear.name, linear.role)].add(linear.codec.form)
    return misfits + [
        f"{module}: is one layer in memory, but would be stored as {' and '.join(sorted(schemes))}"
        for module, schemes in modules.items()
        if len(schemes) > 1
    ]


def share_multiple(linear: Linear) -> int:
    """Marlin's tiles, and no group or block cut in two."""
    match linear.codec:
        case Weight4Float8():
            return w4afp8.tile(linear)
        case RoundToNearest(group_size=group) if linear.ranks == IN:
            tile = TILE if linear.role in EXPERT_ROLES else DENSE_TILE
            return math.lcm(tile, 1 if group == CHANNEL else int(group))
        case Float4Group() | NvFloat4() if linear.ranks == IN:
            return TILE if linear.role in EXPERT_ROLES else DENSE_TILE
        case ConvolutionalCode():
            return IN_MULTIPLE if linear.ranks == IN else 1  # a byte has the local scales of 128 inputs
        case RoundToNearest() | Float4Group() | NvFloat4():
            return TILE
        case Float8Block():
            return BLOCK
    return 1


def library(config: Mapping[str, Any]) -> str:
    """transformers where it loads them by itself."""
    return "transformers" if _commands.transformers(Place("."), config) and loads_alone(config) else "vllm"


def commands(place: Place, config: Mapping[str, Any], spread: Spread) -> list[tuple[str, str]]:
    """How to run it, here and in transformers where that loads it."""
    return _commands.vllm(place, config, spread) + _commands.transformers(place, config)
