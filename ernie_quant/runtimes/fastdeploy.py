"""FastDeploy and Paddle: names and layouts of the `-Paddle` repositories, unquantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.runtimes import Linear

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

LAYOUT = "paddle"
CODECS = (Keep,)


def parts(name: str, codec: Codec, spec: TensorSpec) -> dict[str, TensorSpec]:
    """The weight itself."""
    return {name: spec}


def constants(name: str, codec: Codec, spec: TensorSpec) -> dict[str, torch.Tensor]:
    """None."""
    return {}


def pack(name: str, codec: Codec, encoded: Encoded) -> dict[str, torch.Tensor]:
    """The weight itself."""
    return {name: encoded["weight"]}


def unpack(name: str, codec: Codec, stored: Mapping[str, torch.Tensor]) -> Encoded:
    """The weight itself."""
    return {"weight": stored[name]}


def weight_of(name: str) -> tuple[str, str]:
    """Every stored tensor is a weight of its own."""
    return name, name


def notes(linears: Sequence[Linear]) -> list[str]:
    """None."""
    return []


def layer_of(name: str, role: str) -> str:
    """Every weight is a layer of its own."""
    return name


def problems(linears: Sequence[Linear]) -> list[str]:
    """Every codec but `keep`."""
    return [
        f"{li.name}: cannot be written for FastDeploy as {li.codec.describe()}"
        for li in linears
        if not isinstance(li.codec, Keep)
    ]


def quantization_config(linears: Sequence[Linear]) -> dict[str, Any] | None:
    """None."""
    return None


def codecs_of(config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
    """Everything is kept."""
    return {name: KEEP for name, _ in linears}


def tp_sizes(linears: Sequence[Linear], dims: Mapping[str, int], heads: int) -> list[int]:
    """Tensor-parallel sizes, powers of two, that heads and widths allow."""
    kv_heads = dims["kv_heads"]
    widths = [dims[k] for k in ("M", "M1", "MS", "I") if dims.get(k)]
    return [
        tp
        for tp in (1, 2, 4, 8, 16)
        if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0) and all(w % tp == 0 for w in widths)
    ]


def commands(out: Path, config: Mapping[str, Any], tp: Sequence[int]) -> list[tuple[str, str]]:
    """How to run it."""
    server = "python -m fastdeploy.entrypoints.openai.api_server"
    return [("FastDeploy", f"{server} --model {out} --tensor-parallel-size {tp[0] if tp else 1}")]
