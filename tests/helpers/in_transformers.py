"""Checkpoints that transformers does not load by itself, and models that it has loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import COMPRESSED_TENSORS, Float8Block
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.codecs.w4afp8 import Weight4Float8
from helpers.models import config

INT4, INT8, WINT2 = RoundToNearest(4, 128), RoundToNearest(8, CHANNEL), ConvolutionalCode(effort=1)
FLOAT8 = Float8Block(COMPRESSED_TENSORS)
LAST, EXPERTS, VISION = r"layers\.2\.mlp\.experts", r"\.experts\.", r"\.experts\.[4-7]\."  # of vl the last four

# family of the source, and which layers have which codec, the first match wins; what nothing matches is kept
CASES: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "WINT2": ("moe", ((EXPERTS, WINT2),)),
    "WINT4, then WINT2, WINT8": ("moe_mtp", ((LAST, WINT2), (EXPERTS, INT4), (r"layers.*_proj", INT8))),
    "WINT2, one layer kept": ("moe", ((LAST, WINT2),)),
    "int4, then int8": ("moe", ((LAST, INT8), (EXPERTS, INT4))),
    "int4, one layer kept": ("moe", ((LAST, KEEP), ("_proj", INT4))),
    "attention alone": ("moe", (("self_attn", INT8),)),
    "float8 in the words of compressed-tensors": ("moe", (("_proj", FLOAT8),)),
    "int4 for float8 inputs": ("moe", ((EXPERTS, Weight4Float8()),)),
    "NVFP4": ("moe", (("_proj", NvFloat4()),)),
    "VL, int4": ("vl", (("_proj", INT4),)),
    "VL, float8": ("vl", (("_proj", FLOAT8),)),
    "VL, WINT2": ("vl", ((EXPERTS, WINT2), ("self_attn", INT8))),
    "VL, text in int8, vision in WINT2": ("vl", ((VISION, WINT2), (EXPERTS, INT8))),
}
# and how many layers' experts are packed
TWO_BITS = {
    "WINT2": 2, "WINT4, then WINT2, WINT8": 2, "WINT2, one layer kept": 1, "VL, WINT2": 2, "VL, text in int8, vision in WINT2": 2,
}  # fmt: skip


class Pair(NamedTuple):
    """A quantized checkpoint, the plain bf16 one, and what both come from."""

    out: Path
    plain: Path
    source: Path


def loaded(folder: Path, **named: Any) -> PreTrainedModel:
    """A model for generation, in bf16; transformers' own warnings of what is deprecated are left out."""
    cls = AutoModelForImageTextToText if "text_config" in config(folder) else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found: PreTrainedModel = cls.from_pretrained(folder, **({"dtype": torch.bfloat16} | named))
    return found.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """float32, of two texts of twelve tokens."""
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest of logits; that of models which differ nowhere is 0.0."""
    return float((logits(model) - logits(other)).abs().max())


def other_parameters(model: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    """Names of those that one of them lacks, or whose dtype, shape or any value differs."""
    left, right = dict(model.named_parameters()), dict(other.named_parameters())
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left
        or name not in right
        or left[name].dtype != right[name].dtype
        or not torch.equal(left[name], right[name])
    )
