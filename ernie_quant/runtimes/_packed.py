"""Names and bytes of quantized weights in PT checkpoints. P is a layer's name, [N, K] its weight:

    integers  P.weight_packed int32 [N, K x bits / 32], P.weight_scale bf16 [N, groups], P.weight_shape int64 [2]
    float4    _float4.py
    float8    P.weight float8_e4m3fn [N, K], P.weight_scale_inv (as `fp8`) or P.weight_scale float32, one per block
    WINT2     _wint2.py

vllm-project/compressed-tensors (compressors/pack_quantized), vllm-project/vllm (quantization/fp8.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import FP8, Float8Block
from ernie_quant.codecs.keep import Keep
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.runtimes import Part, kept
from ernie_quant.runtimes import _float4 as float4
from ernie_quant.runtimes import _wint2 as wint2

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

PARTS = (*wint2.PARTS, "weight_shape", "weight_scale_inv", *float4.GLOBAL, "weight")


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
        case ConvolutionalCode():
            return wint2.parts(module, spec)
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
        case ConvolutionalCode():
            return wint2.pack(module, encoded)
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
        case ConvolutionalCode():
            return wint2.unpack(module, stored)
        case Float8Block():
            return {"codes": stored[f"{module}.weight"], "scale": stored[f"{module}.{_scale(codec)}"]}
    return {"weight": stored[name]}


def _scale(codec: Float8Block) -> str:
    return "weight_scale_inv" if codec.quant_method == FP8 else "weight_scale"


def weight_of(name: str) -> tuple[str, str]:
    """`….up_proj.weight_packed` -> (`….up_proj.weight`, `weight_packed`)."""
    module, _, part = name.rpartition(".")
    return (f"{module}.weight", part) if part in PARTS else (name, part)
