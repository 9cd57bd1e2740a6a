"""Names and bytes of FastDeploy's quantized weights. P is a layer's name, K its inputs, N its outputs:

    WINT2   P.quant_weight uint8 [K/4, N], P.weight_scale uint8 [K/128, N] (two uint4, the first in the high nibble),
            P.super_scales bf16 [N], P.code_scale f32 [N], P.code_zp f32 [N]
    WINT4   P.quant_weight int8 [N/2, K], P.weight_scale bf16 [N]      codes -7 to 7
    WINT8   P.quant_weight int8 [N, K],   P.weight_scale bf16 [N]      codes -127 to 127
    W4A8    P.quant_weight int8 [K/2, N] (codes -7 to 7 in two's complement, row 2j in the low nibble of byte j),
            P.weight_scale f32 [N] (what code 7 stands for), P.activation_scale f32 [1] (what 127 stands for)
    C8      of a WINT8 qkv_proj: cachek_matmul.activation_scale and cachev_matmul.activation_scale f32 [KV] beside it

PaddlePaddle/FastDeploy (model_executor/layers/quantization/wint2.py, weight_only.py, kv_cache.py,
layers/moe/fused_moe_wint2_backend.py, fused_moe_cutlass_backend.py: load_w4a8_scale_weights) and
paddle.nn.quant.weight_quantize (arch 80; for W4A8 the loader calls it, on the tensor above).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.codecs.rtn_kv import CachedRoundToNearest
from ernie_quant.codecs.w4a8 import Weight4Activation8
from ernie_quant.runtimes import Part, kept
from ernie_quant.runtimes._w4w2 import GROUP

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

HIGHEST = 7  # code of W4A8
QKV = ".qkv_proj.weight"
CACHED = {"key_scale": "cachek_matmul", "value_scale": "cachev_matmul"}  # field -> what FastDeploy calls it
KV = ("KV",)  # of the outputs that ranks share


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
        case Weight4Activation8():
            return {
                f"{layer}.quant_weight": Part(TensorSpec((width // 2, out), "I8"), 1, 0),
                f"{layer}.weight_scale": Part(TensorSpec((out,), "F32"), 0, None),
                f"{layer}.activation_scale": Part(TensorSpec((1,), "F32"), None, None),
            }
        case CachedRoundToNearest(cached_channels=channels):
            scale = Part(TensorSpec((channels,), "F32"), None, None, outputs=KV)
            return parts(name, codec.integers, spec) | dict.fromkeys(_cache_names(name).values(), scale)
        case RoundToNearest(bits=bits):
            return {
                f"{layer}.quant_weight": Part(TensorSpec((out * bits // 8, width), "I8"), 0, 1, interleave=2),
                f"{layer}.weight_scale": Part(TensorSpec((out,), "BF16"), 0, None),
            }
    return {name: kept(codec.specs(spec)["weight"])}


def constants(name: str, codec: Codec, spec: TensorSpec, once: Encoded) -> dict[str, torch.Tensor]:
    """The scales of inputs, and those of the cache."""
    match codec:
        case Weight4Activation8():
            return {f"{name.removesuffix('.weight')}.activation_scale": once["activation_scale"]}
        case CachedRoundToNearest():
            return {stored: once[field] for field, stored in _cache_names(name).items()}
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
        case Weight4Activation8():
            low, high = encoded["codes"][:, 0::2], encoded["codes"][:, 1::2]
            return {
                f"{layer}.quant_weight": ((low & 15) | (high << 4)).t().contiguous(),
                f"{layer}.weight_scale": encoded["scale"][:, 0] * HIGHEST,
            }
        case CachedRoundToNearest():
            return pack(name, codec.integers, encoded)
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
        case Weight4Activation8():
            pairs = stored[f"{layer}.quant_weight"].t()
            return {
                "codes": torch.stack([(pairs << 4) >> 4, pairs >> 4], 2).flatten(1),
                "scale": (stored[f"{layer}.weight_scale"] / HIGHEST)[:, None],
                "activation_scale": stored[f"{layer}.activation_scale"],
            }
        case CachedRoundToNearest():
            cache = {field: stored[part] for field, part in _cache_names(name).items()}
            return unpack(name, codec.integers, stored) | cache
        case RoundToNearest(bits=bits):
            packed = stored[f"{layer}.quant_weight"]
            codes = kernels.of("weight_quantize", packed).unpack(packed, bits)
            return {"codes": codes, "scale": stored[f"{layer}.weight_scale"][:, None]}
    return {"weight": stored[name]}


PARTS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp", "activation_scale")


def weight_of(name: str) -> tuple[str, str]:
    """`….down_proj.quant_weight` -> (`….down_proj.weight`, `quant_weight`); the cache is the qkv_proj's."""
    layer, _, part = name.rpartition(".")
    if part not in PARTS:
        return name, part
    attention, _, last = layer.rpartition(".")
    return (f"{attention}{QKV}", f"{last}.{part}") if last in CACHED.values() else (f"{layer}.weight", part)


def _cache_names(name: str) -> dict[str, str]:
    """Field -> stored tensor of the cache that belongs to a qkv_proj."""
    return {field: f"{name.removesuffix(QKV)}.{kind}.activation_scale" for field, kind in CACHED.items()}
