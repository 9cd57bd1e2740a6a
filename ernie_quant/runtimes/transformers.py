"""transformers: the files of vLLM, with the forms that only compressed-tensors' own unpacking takes (2 bits, any group)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_quant.runtimes import Linear, vllm
from ernie_quant.runtimes.vllm import LAYOUT, codecs_of, constants, pack, parts, quantization_config, tp_sizes, unpack, weight_of

__all__ = [
    "LAYOUT", "codecs_of", "commands", "constants", "notes", "pack", "parts", "problems", "quantization_config", "tp_sizes",
    "unpack", "weight_of",
]  # fmt: skip


def notes(linears: Sequence[Linear]) -> list[str]:
    """None: it dequantizes."""
    return []


def problems(linears: Sequence[Linear]) -> list[str]:
    """Layers that are one module in memory must be stored in one form here too, and all experts alike."""
    return vllm.mixed(linears) + vllm.mixed_experts(linears)


def commands(out: Path, config: Mapping[str, Any], tp: Sequence[int]) -> list[tuple[str, str]]:
    """How to run it."""
    return [(title, command) for title, command in vllm.commands(out, config, tp) if title == "transformers"]
