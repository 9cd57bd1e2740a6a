"""How PT checkpoints are run, and from which versions on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_quant.codecs.fp8 import COMPRESSED_TENSORS

Commands = list[tuple[str, str]]
SPECIAL = set('"$`\\!')  # to a shell, in double quotes

# vLLM 0.12 looks for experts under "Linear" (compressed_tensors_moe.py), which no config.json of this tool has
VLLM = "vLLM >= 0.13"
# up to 5.12 experts in integers are left random without a word; fp8 fails in 5.8 and in 5.16.0 (each tried)
TRANSFORMERS = "transformers >= 5.17"


def vllm(out: Path, config: Mapping[str, Any], tp: Sequence[int]) -> Commands:
    """A server."""
    most = f"   # or {', '.join(map(str, tp[1:]))}" if len(tp) > 1 else ""
    trust = " --trust-remote-code" if is_vl(config) else ""
    return [(VLLM, f"vllm serve {shlex.quote(str(out))} --tensor-parallel-size {tp[0] if tp else 1}{trust}{most}")]


def transformers(out: Path, config: Mapping[str, Any]) -> Commands:
    """A pipeline; nothing for what it would not load."""
    if is_vl(config) or not _one_form_of_experts(config):
        return []
    call = f"pipeline('text-generation', {str(out)!r})('Hello', max_new_tokens=20)"
    snippet = f"from transformers import pipeline; print({call})"
    quoted = shlex.quote(snippet) if SPECIAL & set(snippet) else f'"{snippet}"'
    return [(TRANSFORMERS, f"python -c {quoted}")]


def is_vl(config: Mapping[str, Any]) -> bool:
    """In either spelling of config.json."""
    return "text_config" in config or "vision_config" in config


def _one_form_of_experts(config: Mapping[str, Any]) -> bool:
    """Does one group of config.json speak of the routed experts of all layers? See `transformers.problems`."""
    entry = config.get("quantization_config", {})
    if entry.get("quant_method") != COMPRESSED_TENSORS or "moe_num_experts" not in config:
        return True
    groups = [group["targets"] for group in entry["config_groups"].values()]
    return [any(map(_of_routed, patterns)) for patterns in groups].count(True) == 1 and not any(map(_of_routed, entry["ignore"]))


def _of_routed(pattern: str) -> bool:
    return r"\.experts\." in pattern
