"""What transformers loads rightly by itself, and what with `import ernie_quant.transformers` (ernie_quant/serving)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_quant.codecs.fp8 import COMPRESSED_TENSORS, FP8

# up to 5.12 experts in integers are left random without a word; fp8 fails in 5.8 and in 5.16.0 (each tried)
ALONE = "transformers >= 5.17"
OLDEST, NEWEST = (5, 18), (5, 24)  # with our quantizer: its hooks changed with 5.21, and both sides are under test
IMPORT = "import ernie_quant.transformers"
ITS_OWN = ("pack-quantized", "mxfp4-pack-quantized")  # of compressed-tensors' formats those that it was seen to decode rightly


def versions() -> str:
    """`5.18 to 5.24`."""
    return " to ".join(".".join(map(str, version)) for version in (OLDEST, NEWEST))


def is_vl(config: Mapping[str, Any]) -> bool:
    """In either spelling of config.json."""
    return "text_config" in config or "vision_config" in config


def loads_alone(config: Mapping[str, Any]) -> bool:
    """Does it load a checkpoint of this config.json, as it is meant, without our import?

    It decodes the experts of all layers by the first group of config.json that names some, those in NVFP4 without their global
    scale (compressed-tensors 0.20: logits off by up to 11.6), does not know blocks of float8 in compressed-tensors' words, and
    has no loader for quantized experts of two widths (integrations/compressed_tensors.py; tried: tests/serving/).
    """
    entry = config.get("quantization_config")
    if not entry:
        return True
    if is_vl(config) or entry.get("quant_method") not in (FP8, COMPRESSED_TENSORS):
        return False
    groups = list(entry.get("config_groups", {}).values())
    if any(rounds_inputs(group) or group.get("format", entry.get("format")) not in ITS_OWN for group in groups):
        return False
    if entry["quant_method"] == FP8 or "moe_num_experts" not in config:
        return True
    routed = [any(map(_of_routed, group["targets"])) for group in groups]
    return routed.count(True) <= 1 and not any(map(_of_routed, entry.get("ignore") or ()))


def rounds_inputs(group: Mapping[str, Any]) -> bool:
    """Codes of 4 bits that a program shall not multiply with inputs as they are; blocks of float8 it rounds itself."""
    return bool(group.get("format") in ("pack-quantized", "nvfp4-pack-quantized") and group.get("input_activations"))


def _of_routed(pattern: str) -> bool:
    return r"\.experts\." in pattern
