"""FastDeploy: the `-Paddle` repositories, plain, or prequantized with experts in WINT2 / WINT4 or in W4A8, and WINT8 for all
else. Names and bytes of the tensors: _container.py; what config.json says of them: _w4w2.py and _w4a8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.keep import Keep
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.codecs.rtn_kv import CachedRoundToNearest
from ernie_quant.codecs.w4a8 import Weight4Activation8
from ernie_quant.names import MTP, OUT, ROUTER, VISION_EXPERT
from ernie_quant.paths import MTP_FOLDER
from ernie_quant.runtimes import About, Linear, Place, Spread, _commands
from ernie_quant.runtimes import _container as container
from ernie_quant.runtimes import _usual as usual
from ernie_quant.runtimes import _w4a8 as w4a8
from ernie_quant.runtimes import _w4w2 as w4w2
from ernie_quant.runtimes._values import TENSOR
from ernie_quant.runtimes._w4w2 import GROUP
from ernie_quant.runtimes._w4w2 import WINT2 as WINT2
from ernie_quant.runtimes._w4w2 import WINT4 as WINT4
from ernie_quant.runtimes._w4w2 import WINT8 as WINT8

LAYOUT, FORMAT = "paddle", "safetensors"
ROWS = 4  # of which weight_quantize's layout mixes the bytes
CODECS = (Keep, RoundToNearest, ConvolutionalCode, Weight4Activation8, CachedRoundToNearest)
CONFIG = {"is_quantized": True}  # beside quantization_config
RECIPES = ("paddle", "wint4", "wint2", "w4a8")
parts, constants, pack, unpack, weight_of = (
    container.parts, container.constants, container.pack, container.unpack, container.weight_of
)  # fmt: skip
model_problems, stem, fallback, suited = usual.model_problems, usual.stem, usual.fallback, usual.suited
one_scale = usual.one_scale
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
    if isinstance(linear.codec, Weight4Activation8):
        return w4a8.share_multiple(linear, both)
    if linear.ranks == OUT:
        return 8 * both
    return 2 * GROUP if isinstance(linear.codec, ConvolutionalCode) else GROUP


def layer_of(name: str, role: str) -> str:
    """Every weight is a layer of its own."""
    return name


alike, candidates = w4w2.alike, w4w2.candidates


def problems(linears: Sequence[Linear]) -> list[str]:
    """What its containers do not hold."""
    if all(isinstance(li.codec, Keep) for li in linears):
        return []
    return [*w4a8.problems(linears)] if w4a8.holds(linears) else w4w2.problems(linears)


def unsupported(linears: Sequence[Linear]) -> list[str]:
    """What can be written but has no loader."""
    if any(li.role == VISION_EXPERT and not isinstance(li.codec, Keep) for li in linears):
        return [
            "FastDeploy has no loader for a WINT2 or WINT4 VL checkpoint: fp8, and wint2 or wint4 with --runtime vllm, make ones"
            " that load; --unsupported writes this one all the same"
        ]
    return []


def notes(linears: Sequence[Linear]) -> list[str]:
    """What a version of FastDeploy does wrong with such files."""
    if all(isinstance(li.codec, Keep) for li in linears):
        return []
    machete = "FD_USE_MACHETE=0 is needed: with it at 1, its default, some FastDeploy versions load zeros for WINT8 layers"
    return [machete, *(w4a8.notes(linears) if w4a8.holds(linears) else ())]


def quantization_config(linears: Sequence[Linear]) -> dict[str, Any] | None:
    """The entry of config.json."""
    if all(isinstance(li.codec, Keep) for li in linears):
        return None
    return w4a8.config(linears) if w4a8.holds(linears) else w4w2.config(linears)


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """The codec that `quantization_config` promises for each linear (Paddle name). Raises ConfigError."""
    if config.get("quantization") == w4a8.QUANTIZATION:
        return w4a8.codecs_of(config, linears)
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
