"""What FastDeploy's container of W4A8 experts, WINT8 linears and an int8 KV cache holds, and its quantization_config: both ways.

PaddlePaddle/FastDeploy, model_executor/layers/quantization/mix_quant.py, w4a8.py, kv_cache.py (all read from config.json) and
layers/moe/moe.py: without `is_permuted: false` the loader takes codes and scales for those of its kernel, and reads other ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.rtn_kv import CachedRoundToNearest
from ernie_quant.codecs.w4a8 import Weight4Activation8
from ernie_quant.errors import ConfigError
from ernie_quant.names import EXPERT_ROLES, MTP, OUT, VISION_EXPERT
from ernie_quant.runtimes import Linear
from ernie_quant.runtimes._w4w2 import LINEAR, WINT8

QUANTIZATION = "mix_quant"
BLOCKS = (128, 256, 512, 1024)  # of its Hadamard kernel: custom_ops/gpu_ops/moe/moe_fast_hardamard_kernel.cu, DISPATCH_SP_logN
TILE_IN, TILE_OUT = 64, 8  # weight_quantize(algo="w4a8") interleaves 64 inputs; tiles of channels as of WINT4
SAYS = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4a8",
    "kv_cache_quant_type": "int8",
    "is_quantized": True,
    "is_permuted": False,
}
DOWN, QKV, O = ".down_proj.weight", ".self_attn.qkv_proj.weight", ".self_attn.o_proj.weight"  # noqa: E741


def holds(linears: Sequence[Linear]) -> bool:
    """Is any of them stored as only this container stores it?"""
    return any(isinstance(li.codec, Weight4Activation8 | CachedRoundToNearest) for li in linears)


def config(linears: Sequence[Linear]) -> dict[str, Any]:
    """All of it is read."""
    return {"quantization": QUANTIZATION, **SAYS, "hadamard_block_size": next(_blocks(linears))}


def _blocks(linears: Sequence[Linear]) -> Iterator[int]:
    return (li.codec.hadamard_block_size for li in linears if isinstance(li.codec, Weight4Activation8) and _is_down(li.name))


def _is_down(name: str) -> bool:
    return name.endswith(DOWN)


def problems(linears: Sequence[Linear]) -> Iterator[str]:
    """It has one form for each kind of layer, and one block of the rotation."""
    if other := next((li for li in linears if li.role == VISION_EXPERT), None):
        yield f"{other.name}: FastDeploy loads W4A8 of text models only: wint4 --runtime vllm and fp8 make VL models that load"
        return
    block = next((block for block in _blocks(linears) if block in BLOCKS), BLOCKS[0])
    shapes = {li.name: li.spec.shape for li in linears}
    for linear in linears:
        if not LINEAR.search(linear.name):
            continue
        out, width = linear.spec.shape
        rotated = isinstance(linear.codec, Weight4Activation8) and linear.codec.hadamard_block_size  # says its own inputs
        if out % TILE_OUT or (width % TILE_IN and not rotated):
            widths = f"{out} outputs and {width} inputs are not multiples of {TILE_OUT} and {TILE_IN}"
            yield f"{linear.name}: {widths}, which its kernels want"
        yield from _misfit(linear, block, shapes)


def _misfit(linear: Linear, block: int, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Where a linear has another form than the container wants of its kind."""
    codec = linear.codec
    if linear.role in EXPERT_ROLES:
        wanted = block if _is_down(linear.name) else 0
        if not isinstance(codec, Weight4Activation8) or codec.hadamard_block_size != wanted:
            blocks = f"w4a8 with hadamard_block_size {', '.join(map(str, BLOCKS))}, the same for all" if wanted else "w4a8"
            yield f"{linear.name}: FastDeploy's container wants {blocks}, not {codec.describe()}"
    elif _has_cache(linear.name):
        if not isinstance(codec, CachedRoundToNearest):
            yield f"{linear.name}: FastDeploy's container wants WINT8 with the scales of a cache (rtn_kv), not {codec.describe()}"
        elif f"{linear.name.removesuffix(QKV)}{O}" in shapes and codec.cached_channels != (there := _cached(linear.name, shapes)):
            yield f"{linear.name}: cached_channels is {codec.cached_channels}, and the model has {there}"
    elif codec.form != WINT8.form:
        yield f"{linear.name}: FastDeploy's container wants {WINT8.describe()}, not {codec.describe()}"


def _has_cache(name: str) -> bool:
    """The draft model of an MTP block has a cache too, but no text runs through it here."""
    return name.endswith(QKV) and ".layers." in name


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """The codec of each linear (Paddle name), of one orientation all. Raises ConfigError."""
    block = config.get("hadamard_block_size", BLOCKS[0])
    if wrong := next((key for key, value in SAYS.items() if config.get(key) != value), ""):
        said = f"{wrong} {config.get(wrong)!r}"
        raise ConfigError(f"config.json: quantization_config has {said}; of {QUANTIZATION} this tool reads {SAYS[wrong]!r}")
    if type(block) is not int or block not in BLOCKS:
        raise ConfigError(f"config.json: hadamard_block_size is {block!r}, not {', '.join(map(str, BLOCKS))}")
    shapes = {name: spec.shape for name, spec in linears}
    codecs: dict[str, Codec] = {}
    for name in shapes:
        codec: Codec = WINT8 if LINEAR.search(name) else KEEP
        if ".experts." in name:
            codec = Weight4Activation8(block if _is_down(name) else 0)
        elif _has_cache(name):
            codec = CachedRoundToNearest(_cached(name, shapes))
        codecs[name] = codec
    return codecs


def _cached(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Channels of keys: what q, k and v have more than o has inputs is keys and values. Raises ConfigError."""
    other = f"{name.removesuffix(QKV)}{O}"
    qkv, o = shapes[name], shapes.get(other)
    if o is None:
        raise ConfigError(f"{name}: how many of its outputs are keys is known from {other}, which is missing")
    for axis in (0, 1):  # [in, out] or [out, in]: the hidden size is where they meet
        if qkv[axis] == o[1 - axis] and qkv[1 - axis] > o[axis]:
            return (qkv[1 - axis] - o[axis]) // 2
    raise ConfigError(f"{name} {qkv} and {other} {o} are not of one model")


def share_multiple(linear: Linear, both: int) -> int:
    """`both`: 2 where a linear has two shares of outputs."""
    if linear.ranks == OUT:
        return TILE_OUT * both
    block = linear.codec.hadamard_block_size if isinstance(linear.codec, Weight4Activation8) else 0
    return max(TILE_IN, block)


def notes(linears: Sequence[Linear]) -> list[str]:
    """What is weaker than a user may think."""
    if all(li.role != MTP for li in linears):
        return []
    return [
        "the MTP block has no scales of an int8 cache, as no text runs through it: FastDeploy does not load it as a draft model"
    ]
