"""vLLM: compressed-tensors' packed forms for integers and float4, `quant_method: fp8` for float8 blocks. transformers loads all.

Float8 blocks of VL models are compressed-tensors `float-quantized`: vLLM's reader of `fp8` skips a layer whose name begins the
name of a kept one, and `text_experts` begins that of its router, `text_experts_gate` (quant_utils.py, is_layer_skipped).

Formats: vllm-project/compressed-tensors (compressors/pack_quantized), _float4.py, vllm-project/vllm
(model_executor/layers/quantization/compressed_tensors, .../fp8.py), huggingface/transformers (integrations/finegrained_fp8.py).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.fp8 import BLOCK, COMPRESSED_TENSORS, FP8, Float8Block
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.names import EXPERT_ROLES, IN, MTP, QUANTIZABLE, VISION_EXPERT
from ernie_quant.runtimes import About, Linear, Part, Place, Spread, _advice, _commands, _modules, kept
from ernie_quant.runtimes import _float4 as float4
from ernie_quant.runtimes import _promise as promise
from ernie_quant.runtimes import _usual as usual
from ernie_quant.runtimes import _w4afp8 as w4afp8
from ernie_quant.runtimes._values import EXPERTS, STAGES, TENSOR

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

LAYOUT, FORMAT = "pt", "safetensors"
ROWS = 1
CONFIG: dict[str, Any] = {}
RECIPES = ("pt", "wint4", "wint8", "fp8", "mxfp4", "nvfp4")
VERSION = 1
TAGS = ("vllm",)
PROGRAM, PARALLEL, AT_LOAD = "vLLM", (TENSOR, EXPERTS, STAGES), {"fp8": "--quantization fp8"}
PER_RANK, SPLITS_VOCABULARY, QUANTIZES_VOCABULARY, CASTS = False, False, False, False
MORE_BITS_FIRST = False
CODECS = (Keep, RoundToNearest, Float8Block, Float4Group, NvFloat4, NvFloat4Inputs, Weight4Float8)
TILE = 64  # of a rank's outputs, and of the inputs of experts: what Marlin loads (vllm, marlin_utils.py)
DENSE_TILE = 128  # of a rank's inputs of other linears
BITS, GROUPS = (4, 8), (32, 64, 128, CHANNEL)  # what Marlin takes
model_problems, stem, fallback, notes = usual.model_problems, usual.stem, usual.fallback, _advice.notes
quantization_config, codecs_of, misread = promise.quantization_config, promise.codecs_of, promise.misread
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_scale_inv", *float4.GLOBAL, "weight")


def folder(role: str) -> str:
    """All in one."""
    return ""


def kept_as(role: str, spec: TensorSpec, *, quantized: bool) -> str:
    """As it is."""
    return spec.dtype


def recognizes(config: Mapping[str, Any]) -> bool:
    """Integers as compressed-tensors, float8 as DeepSeek."""
    return config.get("quant_method") in ("compressed-tensors", "fp8")


def metadata(about: About) -> tuple[dict[str, Any], tuple[str, ...]]:
    """transformers refuses files without it."""
    return {"format": "pt"}, ()


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """Nothing that could be written all the same."""
    return []


def parts(name: str, codec: Codec, spec: TensorSpec) -> dict[str, Part]:
    """Stored tensors of the weight `name`."""
    module = name.removesuffix(".weight")
    match codec:
        case RoundToNearest(bits=bits, group_size=group):
            out, width = spec.shape
            return {
                f"{module}.weight_packed": Part(TensorSpec((out, -(-width * bits // 32)), "I32"), 0, 1),
                f"{module}.weight_scale": Part(codec.specs(spec)["scale"], 0, None if group == CHANNEL else 1),
                f"{module}.weight_shape": Part(TensorSpec((2,), "I64"), None, None),
            }
        case Float4Group() | NvFloat4():
            return float4.parts(module, codec, spec)
        case Float8Block():
            fields = codec.specs(spec)
            return {f"{module}.weight": Part(fields["codes"], 0, 1), f"{module}.{_scale(codec)}": Part(fields["scale"], 0, 1)}
    assert isinstance(codec, Keep), codec
    return {name: kept(codec.specs(spec)["weight"])}


def constants(name: str, codec: Codec, spec: TensorSpec, once: Encoded) -> dict[str, torch.Tensor]:
    """`weight_shape`: the [out, in] that packing hides; numbers for a whole weight."""
    import torch

    module = name.removesuffix(".weight")
    if isinstance(codec, RoundToNearest):
        return {f"{module}.weight_shape": torch.tensor(spec.shape, dtype=torch.int64)}
    return float4.constants(module, codec, once) if isinstance(codec, float4.FORMS) else {}


def pack(name: str, codec: Codec, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Stored tensors of a slab of rows."""
    module = name.removesuffix(".weight")
    match codec:
        case RoundToNearest(bits=bits):
            return {
                f"{module}.weight_packed": kernels.of("packing", encoded["codes"]).pack(encoded["codes"], bits),
                f"{module}.weight_scale": encoded["scale"],
            }
        case Float4Group() | NvFloat4():
            return float4.pack(module, codec, encoded)
        case Float8Block():
            return {f"{module}.weight": encoded["codes"], f"{module}.{_scale(codec)}": encoded["scale"]}
    return {name: encoded["weight"]}


def unpack(name: str, codec: Codec, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """What was encoded, from the stored tensors of a slab of rows."""
    module = name.removesuffix(".weight")
    match codec:
        case RoundToNearest(bits=bits):
            columns = int(stored[f"{module}.weight_shape"][1])
            packed = stored[f"{module}.weight_packed"]
            codes = kernels.of("packing", packed).unpack(packed, bits, columns)
            return {"codes": codes, "scale": stored[f"{module}.weight_scale"]}
        case Float4Group() | NvFloat4():
            return float4.unpack(module, stored)
        case Float8Block():
            return {"codes": stored[f"{module}.weight"], "scale": stored[f"{module}.{_scale(codec)}"]}
    return {"weight": stored[name]}


def _scale(codec: Float8Block) -> str:
    return "weight_scale_inv" if codec.quant_method == FP8 else "weight_scale"


def weight_of(name: str) -> tuple[str, str]:
    """`….up_proj.weight_packed` -> (`….up_proj.weight`, `weight_packed`)."""
    module, _, part = name.rpartition(".")
    return (f"{module}.weight", part) if part in PARTS else (name, part)


def problems(linears: Sequence[Linear]) -> list[str]:
    """Forms that vLLM has no kernel for, and layers whose parts differ."""
    misfits = [
        f"{li.name}: vLLM loads int4 and int8 in groups of 32, 64, 128 or per channel, not {li.codec.describe()};"
        " --runtime transformers takes it"
        for li in linears
        if isinstance(li.codec, RoundToNearest) and (li.codec.bits not in BITS or li.codec.group_size not in GROUPS)
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
    """Integers, or the weight as it is; float8 blocks have the bytes of int8 and more of its error."""
    int4 = [RoundToNearest(4, group) for group in (128, 64, 32)]
    return (*int4, RoundToNearest(8, CHANNEL), KEEP) if role in QUANTIZABLE and role != MTP else (KEEP,)


def suited(codec: Codec, roles: Collection[str]) -> Codec:
    """VL models have float8 blocks in compressed-tensors' words."""
    if isinstance(codec, Float8Block) and VISION_EXPERT in roles:
        return replace(codec, quant_method=COMPRESSED_TENSORS)
    return codec


def mixed(linears: Sequence[Linear]) -> list[str]:
    """Layers that are one module in memory but would be stored in several schemes."""
    misfits = []
    if len(promise.quant_methods(linears)) > 1:
        misfits = [f"fp8 and integer codes cannot stand in one checkpoint, unless fp8 has quant_method = '{COMPRESSED_TENSORS}'"]
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
        case RoundToNearest() | Float4Group() | NvFloat4():
            return TILE
        case Float8Block():
            return BLOCK
    return 1


def library(config: Mapping[str, Any]) -> str:
    """transformers where it loads them."""
    return "transformers" if _commands.transformers(Place("."), config) else "vllm"


def commands(place: Place, config: Mapping[str, Any], spread: Spread) -> list[tuple[str, str]]:
    """How to run it, here and in transformers where that loads it."""
    return _commands.vllm(place, config, spread) + _commands.transformers(place, config)
