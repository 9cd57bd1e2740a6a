"""quantization_config of PT checkpoints: what config.json says of every layer, and the way back.

`fp8` lists the layers that are kept (deepseek-ai/DeepSeek-V3, config.json; vllm-project/vllm, quantization/fp8.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import BLOCK, COMPRESSED_TENSORS, FP8, Float8Block
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.errors import ConfigError
from ernie_quant.runtimes import Linear, _modules
from ernie_quant.runtimes import _compressed_tensors as compressed_tensors
from ernie_quant.runtimes import _wint2 as wint2


def quant_methods(linears: Sequence[Linear]) -> set[str]:
    """What config.json would have to say as quant_method: one at most. That of WINT2 has groups of packed codes beside it."""
    found = {method for li in linears if (method := _stored(li.codec)[0])}
    return found - {COMPRESSED_TENSORS} if wint2.METHOD in found else found


def _stored(codec: Codec) -> tuple[str, Any, Any]:
    """(quant_method, bits, group): what of a codec config.json says."""
    match codec:
        case Float8Block(quant_method=method):
            return method, 8, BLOCK
        case ConvolutionalCode():
            return wint2.METHOD, codec.form, None
        case Float4Group() | NvFloat4() | Weight4Float8():
            return COMPRESSED_TENSORS, codec.form, None
        case RoundToNearest(bits=bits, group_size=group):
            return COMPRESSED_TENSORS, bits, group
    return "", None, None


def quantization_config(linears: Sequence[Linear]) -> dict[str, Any] | None:
    """The entry of config.json, derived from what is written; layers stand in it under every name that a program looks up."""
    methods = quant_methods(linears)
    if not methods:
        return None
    if methods != {FP8}:
        return compressed_tensors.config(linears)
    names = _modules.names(linears)
    return {
        "quant_method": FP8,
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(
            dict.fromkeys(name for li in linears if isinstance(li.codec, Keep) for name in names[li.name].asked(li.codec))
        ),
    }


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """The codec that it promises for each linear (PT name, [out, in]), by its name in the file. Raises ConfigError."""
    promised = _promised(config, [name.removesuffix(".weight") for name, _ in linears])
    return {name: promised[name.removesuffix(".weight")] for name, _ in linears}


def misread(config: Mapping[str, Any], linears: Sequence[Linear]) -> list[str]:
    """Where it says something else of a linear, by any of its names in any program. Raises ConfigError."""
    names = _modules.names(linears)
    asked = {li.name: names[li.name].asked(li.codec) for li in linears}
    promised = _promised(config, [name for some in asked.values() for name in some])
    return [
        f"{li.name}: is stored as {li.codec.form}, but of {name}, as a program calls the layer, config.json says"
        f" {promised[name].form}"
        for li in linears
        for name in asked[li.name]
        if _stored(promised[name]) != _stored(li.codec)
    ]


def _promised(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Codec]:
    if config.get("quant_method") == FP8:
        kept = set(config.get("modules_to_not_convert", ()))
        return {module: KEEP if module in kept else Float8Block() for module in modules}
    if config.get("quant_method") not in (COMPRESSED_TENSORS, wint2.METHOD):
        raise ConfigError(f"config.json: quant_method {config.get('quant_method')!r} is none that this tool writes")
    return compressed_tensors.codecs_of(config, modules)
