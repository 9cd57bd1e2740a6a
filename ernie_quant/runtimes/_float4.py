"""Float4 in compressed-tensors' words and bytes: `mxfp4-pack-quantized` and `nvfp4-pack-quantized`.

vllm-project/compressed-tensors (compressors/mxfp4, nvfp4; quantization/quant_scheme.py), vllm-project/vllm
(compressed_tensors_moe_w4a4_mxfp4.py, compressed_tensors_moe_w4a4_nvfp4.py, schemes/compressed_tensors_w4a4_nvfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.mxfp4 import GROUP as MX_GROUP
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import GROUP as NV_GROUP
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.names import VISION, VISION_EXPERT
from ernie_quant.runtimes._values import Linear, Part

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Codec, Encoded

Float4: TypeAlias = Float4Group | NvFloat4
FORMS = (Float4Group, NvFloat4)
MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
GLOBAL = {"weight_global_scale": "global_scale", "input_global_scale": "activation_scale"}  # part -> the codec's field
# powers of two per group; the scale's dtype is what tells it from plain float4
MX = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": MX_GROUP,
    "dynamic": False,
    "scale_dtype": "torch.uint8",
}
# float8 per group, and a number for the whole weight
NV = MX | {"strategy": "tensor_group", "group_size": NV_GROUP, "scale_dtype": "torch.float8_e4m3fn"}
NV_INPUTS = NV | {"dynamic": "local"}  # the program makes the scales of groups; the number for all is stored


def scheme(codec: Float4) -> dict[str, Any]:
    """A group of config.json without its targets."""
    if isinstance(codec, Float4Group):
        return {"format": MXFP4, "weights": MX}
    inputs = {"input_activations": NV_INPUTS} if isinstance(codec, NvFloat4Inputs) else {}
    return {"format": NVFP4, "weights": NV, **inputs}


def codec_of(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Codec | None:
    """The way back; None for what is none of these."""
    known: tuple[Codec, ...] = (Float4Group(), NvFloat4(), NvFloat4Inputs())
    said = {"weights": weights, **({} if inputs is None else {"input_activations": inputs})}
    return next((codec for codec in known if {k: v for k, v in scheme(codec).items() if k != "format"} == said), None)  # type: ignore[arg-type]


def problems(linears: Sequence[Linear]) -> list[str]:
    """Scales of inputs that are measured on text, in a model that is shown images too."""
    if all(linear.role not in (VISION, VISION_EXPERT) for linear in linears):
        return []
    return [
        f"{li.name}: fp4 inputs are for text models: scales are measured on text, and images bring other inputs; without"
        " --activations fp4 it can be stored"
        for li in linears
        if isinstance(li.codec, NvFloat4Inputs)
    ]


def parts(module: str, codec: Float4, spec: TensorSpec) -> dict[str, Part]:
    """Stored tensors of a layer."""
    fields, (out, width) = codec.specs(spec), spec.shape
    scale = replace(fields["scale"], dtype="F8_E4M3") if isinstance(codec, NvFloat4) else fields["scale"]
    return {
        f"{module}.weight_packed": Part(TensorSpec((out, width // 2), "U8"), 0, 1),
        f"{module}.weight_scale": Part(scale, 0, 1),
        **{f"{module}.{part}": Part(fields[field], None, None) for part, field in GLOBAL.items() if field in fields},
    }


def constants(module: str, codec: Float4, once: Encoded) -> dict[str, torch.Tensor]:
    """The numbers for a whole weight."""
    return {f"{module}.{part}": once[field] for part, field in GLOBAL.items() if isinstance(codec, NvFloat4) and field in once}


def pack(module: str, codec: Float4, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Stored tensors of a slab of rows."""
    import torch

    scale = encoded["scale"]
    return {
        f"{module}.weight_packed": kernels.of("packing", encoded["codes"]).pack_nibbles(encoded["codes"]),
        f"{module}.weight_scale": scale.view(torch.float8_e4m3fn) if isinstance(codec, NvFloat4) else scale,
    }


def unpack(module: str, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """What was encoded, from the stored tensors of a slab of rows."""
    import torch

    packed = stored[f"{module}.weight_packed"]
    return {
        "codes": kernels.of("packing", packed).unpack_nibbles(packed),
        "scale": stored[f"{module}.weight_scale"].view(torch.uint8),
        **{field: stored[f"{module}.{part}"] for part, field in GLOBAL.items() if f"{module}.{part}" in stored},
    }
