"""transformers: the files of vLLM, with the forms that only compressed-tensors' own unpacking takes (2 bits, any group)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_quant.runtimes import Linear, vllm

CODECS = vllm.CODECS
LAYOUT, FORMAT, ROWS, CONFIG = vllm.LAYOUT, vllm.FORMAT, vllm.ROWS, vllm.CONFIG
RECIPES, PER_RANK, SPLITS_VOCABULARY = ("wint4", "wint8", "fp8"), vllm.PER_RANK, vllm.SPLITS_VOCABULARY
parts, constants, pack, unpack, weight_of = vllm.parts, vllm.constants, vllm.pack, vllm.unpack, vllm.weight_of
layer_of, quantization_config, codecs_of = vllm.layer_of, vllm.quantization_config, vllm.codecs_of
suited, misread = vllm.suited, vllm.misread
share_multiple, folder, metadata, unsupported = vllm.share_multiple, vllm.folder, vllm.metadata, vllm.unsupported


def recognizes(config: Mapping[str, Any]) -> bool:
    """Its files are vLLM's, which answers for them."""
    return False


def notes(linears: Sequence[Linear]) -> list[str]:
    """Nothing: it dequantizes."""
    return []


def problems(linears: Sequence[Linear]) -> list[str]:
    """Layers that are one module in memory must be stored in one form here too, and all experts alike."""
    return vllm.unknown(linears) + vllm.mixed(linears) + vllm.mixed_experts(linears)


def commands(out: Path, config: Mapping[str, Any], tp: Sequence[int]) -> list[tuple[str, str]]:
    """How to run it."""
    return [(title, command) for title, command in vllm.commands(out, config, tp) if title == "transformers"]
