"""transformers: the files of vLLM, with the forms that only compressed-tensors' own unpacking takes (2 bits, any group).

What transformers does not load by itself it loads with our quantizer, `import ernie_quant.transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.names import EXPERT, VISION_EXPERT
from ernie_quant.runtimes import Linear, Place, Spread, _commands, vllm
from ernie_quant.runtimes import _w4afp8 as w4afp8
from ernie_quant.runtimes._transformers import IMPORT, loads_alone, versions
from ernie_quant.runtimes._values import STAGES

CODECS = vllm.CODECS
LAYOUT, FORMAT, ROWS, CONFIG = vllm.LAYOUT, vllm.FORMAT, vllm.ROWS, vllm.CONFIG
RECIPES, PER_RANK, SPLITS_VOCABULARY = ("wint4", "wint8", "fp8", "mxfp4", "nvfp4", "wint2"), vllm.PER_RANK, vllm.SPLITS_VOCABULARY
QUANTIZES_VOCABULARY, CASTS, MORE_BITS_FIRST = vllm.QUANTIZES_VOCABULARY, vllm.CASTS, vllm.MORE_BITS_FIRST
VERSION = vllm.VERSION
TAGS: tuple[str, ...] = ()
PROGRAM, PARALLEL = "transformers", (STAGES,)
AT_LOAD: dict[str, str] = {}
kept_as = vllm.kept_as
parts, constants, pack, unpack, weight_of = vllm.parts, vllm.constants, vllm.pack, vllm.unpack, vllm.weight_of
layer_of, alike, quantization_config, codecs_of = vllm.layer_of, vllm.alike, vllm.quantization_config, vllm.codecs_of
suited, misread, one_scale = vllm.suited, vllm.misread, vllm.one_scale
share_multiple, folder, metadata = vllm.share_multiple, vllm.folder, vllm.metadata
model_problems, stem, fallback = vllm.model_problems, vllm.stem, vllm.fallback

NOTE = (
    f"transformers ({versions()}) loads this after `{IMPORT}` alone; without it experts are left random with no more than a"
    " warning, decoded wrongly without a word, or refused, as the case may be"
)
SPELLING = "transformers does not know the flat config.json of VL models: --vl-config transformers"


def recognizes(config: Mapping[str, Any]) -> bool:
    """Its files are vLLM's, which answers for them."""
    return False


def candidates(role: str) -> tuple[Codec, ...]:
    """It has no choice: all experts have one form, and it decodes them when it loads them."""
    return (KEEP,)


def notes(linears: Sequence[Linear]) -> list[str]:
    """What it loads with our quantizer alone."""
    entry = quantization_config(linears)
    roles = {li.role for li in linears}
    config = {"quantization_config": entry} | ({"moe_num_experts": 1} if EXPERT in roles else {})
    if not entry or loads_alone(config | ({"vision_config": {}} if VISION_EXPERT in roles else {})):
        return []
    return [NOTE, *([SPELLING] if VISION_EXPERT in roles else [])]


def problems(linears: Sequence[Linear]) -> list[str]:
    """Layers that are one module in memory must be stored in one form here too, and inputs are never rounded."""
    alone = [*w4afp8.held(linears), *(li for li in linears if isinstance(li.codec, NvFloat4Inputs))]
    rounded = [f"{li.name}: {li.codec.describe()} is computed by vLLM alone; --runtime vllm" for li in alone]
    return rounded + vllm.unknown(linears) + vllm.mixed(linears)


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """Nothing that could be written all the same."""
    return []


def library(config: Mapping[str, Any]) -> str:
    """Its own name."""
    return "transformers"


def commands(place: Place, config: Mapping[str, Any], spread: Spread) -> list[tuple[str, str]]:
    """How to run it; layers go to GPUs by themselves."""
    return _commands.transformers(place, config)
