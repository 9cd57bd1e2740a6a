"""FastDeploy: the `-Paddle` repositories, plain, or prequantized with WINT2 / WINT4 experts and WINT8 for all else.

Formats: PaddlePaddle/FastDeploy (model_executor/layers/quantization/wint2.py, weight_only.py, mix_quant.py,
layers/moe/fused_moe_wint2_backend.py) and paddle.nn.quant.weight_quantize (arch 80). P is a layer's name, K its
inputs, N its outputs:

    WINT2   P.quant_weight uint8 [K/4, N], P.weight_scale uint8 [K/128, N] (two uint4, the first in the high nibble),
            P.super_scales bf16 [N], P.code_scale f32 [N], P.code_zp f32 [N]
    WINT4   P.quant_weight int8 [N/2, K], P.weight_scale bf16 [N]      codes -7 to 7
    WINT8   P.quant_weight int8 [N, K],   P.weight_scale bf16 [N]      codes -127 to 127
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.keep import Keep
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.names import EXPERT_ROLES, MTP, OUT, ROUTER, VISION_EXPERT
from ernie_quant.paths import MTP_FOLDER
from ernie_quant.runtimes import About, Linear, Part, Place, Spread, _commands, kept
from ernie_quant.runtimes import _usual as usual
from ernie_quant.runtimes import _w4w2 as w4w2
from ernie_quant.runtimes._values import TENSOR
from ernie_quant.runtimes._w4w2 import GROUP, LINEAR, WINT2, WINT4, WINT8, wint2_from, wint4_to

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

LAYOUT, FORMAT = "paddle", "safetensors"
ROWS = 4  # of which weight_quantize's layout mixes the bytes
CODECS = (Keep, RoundToNearest, ConvolutionalCode)
CONFIG = {"is_quantized": True}  # beside quantization_config
RECIPES = ("paddle", "wint4", "wint2")
model_problems, stem, fallback, suited = usual.model_problems, usual.stem, usual.fallback, usual.suited
VERSION = 1
TAGS = ("fastdeploy",)
PROGRAM, PARALLEL = "FastDeploy", (TENSOR,)
AT_LOAD = {"wint8": "--quantization wint8", "wint4": "--quantization wint4"}
PER_RANK, SPLITS_VOCABULARY, QUANTIZES_VOCABULARY, CASTS, MORE_BITS_FIRST = True, True, False, False, True


def folder(role: str) -> str:
    """The speculative model is read from a folder of its own."""
    return MTP_FOLDER if role == MTP else ""


def kept_as(role: str, spec: TensorSpec, *, quantized: bool) -> str:
    """Beside codes bfloat16, but for routers; a plain result has the bytes of its source.

    Biases and scales of experts are set without a cast (layers/linear.py, layers/moe/): config.json's dtype is bfloat16.
    """
    return "BF16" if quantized and role != ROUTER else spec.dtype


def recognizes(config: Mapping[str, Any]) -> bool:
    """Its own key."""
    return "quantization" in config


def metadata(about: About) -> tuple[dict[str, Any], tuple[str, ...]]:
    """As in the published files."""
    return {"format": "np"}, ()


def share_multiple(linear: Linear) -> int:
    """Tiles of 8 outputs, of gate and of up; no local scale cut in two, and WINT2 stores two of them to a byte."""
    if linear.name.endswith("qkv_proj.weight"):
        return 0  # whole heads are enough
    both = 2 if linear.name.endswith("up_gate_proj.weight") else 1
    if isinstance(linear.codec, Keep):
        return both
    if linear.ranks == OUT:
        return 8 * both
    return 2 * GROUP if isinstance(linear.codec, ConvolutionalCode) else GROUP


def parts(name: str, codec: Codec, spec: TensorSpec) -> dict[str, Part]:
    """Stored tensors of the weight `name` [out, in]."""
    layer = name.removesuffix(".weight")
    out, width = spec.shape if len(spec.shape) == 2 else (0, 0)
    match codec:
        case ConvolutionalCode():
            return {
                f"{layer}.quant_weight": Part(TensorSpec((width // 4, out), "U8"), 1, 0),
                f"{layer}.weight_scale": Part(TensorSpec((width // (2 * GROUP), out), "U8"), 1, 0),
                f"{layer}.super_scales": Part(TensorSpec((out,), "BF16"), 0, None),
                f"{layer}.code_scale": Part(TensorSpec((out,), "F32"), 0, None),
                f"{layer}.code_zp": Part(TensorSpec((out,), "F32"), 0, None),
            }
        case RoundToNearest(bits=bits):
            return {
                f"{layer}.quant_weight": Part(TensorSpec((out * bits // 8, width), "I8"), 0, 1, interleave=2),
                f"{layer}.weight_scale": Part(TensorSpec((out,), "BF16"), 0, None),
            }
    return {name: kept(codec.specs(spec)["weight"])}


def constants(name: str, codec: Codec, spec: TensorSpec, once: Encoded) -> dict[str, torch.Tensor]:
    """There are none."""
    return {}


def pack(name: str, codec: Codec, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Stored tensors of a slab of rows (of columns, where the stored tensor has the outputs last)."""
    layer = name.removesuffix(".weight")
    match codec:
        case ConvolutionalCode():
            local = encoded["local_scale"]
            return {
                f"{layer}.quant_weight": encoded["codes"].t().contiguous(),
                f"{layer}.weight_scale": (local[:, 0::2] * 16 + local[:, 1::2]).t().contiguous(),
                f"{layer}.super_scales": encoded["super_scale"],
                f"{layer}.code_scale": encoded["code_scale"],
                f"{layer}.code_zp": encoded["code_zp"],
            }
        case RoundToNearest(bits=bits):
            return {
                f"{layer}.quant_weight": kernels.of("weight_quantize", encoded["codes"]).pack(encoded["codes"], bits),
                f"{layer}.weight_scale": encoded["scale"][:, 0].contiguous(),
            }
    return {name: encoded["weight"]}


def unpack(name: str, codec: Codec, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """What was encoded, from the stored tensors."""
    import torch

    layer = name.removesuffix(".weight")
    match codec:
        case ConvolutionalCode():
            pairs = stored[f"{layer}.weight_scale"].t()
            return {
                "codes": stored[f"{layer}.quant_weight"].t().contiguous(),
                "local_scale": torch.stack([pairs >> 4, pairs & 15], 2).flatten(1),
                "super_scale": stored[f"{layer}.super_scales"],
                "code_scale": stored[f"{layer}.code_scale"],
                "code_zp": stored[f"{layer}.code_zp"],
            }
        case RoundToNearest(bits=bits):
            packed = stored[f"{layer}.quant_weight"]
            codes = kernels.of("weight_quantize", packed).unpack(packed, bits)
            return {"codes": codes, "scale": stored[f"{layer}.weight_scale"][:, None]}
    return {"weight": stored[name]}


PARTS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")


def weight_of(name: str) -> tuple[str, str]:
    """`….down_proj.quant_weight` -> (`….down_proj.weight`, `quant_weight`)."""
    layer, _, part = name.rpartition(".")
    return (f"{layer}.weight", part) if part in PARTS else (name, part)


def layer_of(name: str, role: str) -> str:
    """Every weight is a layer of its own."""
    return name


alike, candidates = w4w2.alike, w4w2.candidates


def problems(linears: Sequence[Linear]) -> list[str]:
    """What the container does not hold: it has one form for each kind of layer, and WINT4 experts come first."""
    if all(isinstance(li.codec, Keep) for li in linears):
        return []
    misfits = []
    for linear in linears:
        if not LINEAR.search(linear.name):
            continue
        out, width = linear.spec.shape
        if isinstance(linear.codec, RoundToNearest) and (out % 8 or width % GROUP):  # WINT2 says its own widths
            misfits.append(
                f"{linear.name}: {out} outputs and {width} inputs are not multiples of 8 and {GROUP}, which its kernels want"
            )
        wanted = (WINT2, WINT4) if linear.role in EXPERT_ROLES else (WINT8,)
        if not any(linear.codec.form == w.form for w in wanted):
            words = " or ".join(w.describe() for w in wanted)
            misfits.append(f"{linear.name}: FastDeploy's container wants {words}, not {linear.codec.describe()}")
    first, last = wint2_from(linears), wint4_to(linears)
    if first <= last:
        misfits.append(f"experts: WINT4 must come before WINT2, but layer {last} is WINT4 and layer {first} WINT2")
    return misfits


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """What can be written but has no loader."""
    if any(li.role == VISION_EXPERT and not isinstance(li.codec, Keep) for li in linears):
        return [
            "FastDeploy has no loader for a WINT2 or WINT4 VL checkpoint: wint4 --runtime vllm and fp8 make ones that load;"
            " --unsupported writes this one all the same"
        ]
    return []


def notes(linears: Sequence[Linear]) -> list[str]:
    """What a version of FastDeploy does wrong with such files."""
    if all(isinstance(li.codec, Keep) for li in linears):
        return []
    return ["FD_USE_MACHETE=0 is needed: with it at 1, its default, some FastDeploy versions load zeros for WINT8 layers"]


def quantization_config(linears: Sequence[Linear]) -> dict[str, Any] | None:
    """The entry of config.json."""
    return None if all(isinstance(li.codec, Keep) for li in linears) else w4w2.config(linears)


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """The codec that `quantization_config` promises for each linear (Paddle name). Raises ConfigError."""
    return w4w2.codecs_of(config, [name for name, _ in linears])


def misread(config: Mapping[str, Any], linears: Sequence[Linear]) -> list[str]:
    """Where config.json says something else of a linear, which it calls by its name in the file. Raises ConfigError."""
    promised = codecs_of(config, [(li.name, li.spec) for li in linears])
    return [
        f"{li.name}: is stored as {li.codec.form}, but config.json says {promised[li.name].form}"
        for li in linears
        if promised[li.name].form != li.codec.form
    ]


def library(config: Mapping[str, Any]) -> str:
    """As on the cards of the published ones."""
    return "PaddlePaddle"


def commands(place: Place, config: Mapping[str, Any], spread: Spread) -> list[tuple[str, str]]:
    """How to run it."""
    return _commands.fastdeploy(place, config, spread)
