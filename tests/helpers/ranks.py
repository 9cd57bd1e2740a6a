"""Containers that are dealt out to tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ernie_quant.planning.reshard import make_reshard_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from helpers.disk import contents

Tensors = dict[str, torch.Tensor]

# Q 512, KV 128, shared experts 1024: a dense layer, one with WINT4 and one with WINT2 experts, an MTP block.
# With 4 ranks every rank has 128 inputs of each down_proj and 2 heads, and 2 ranks share a kv head.
WIDTHS: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "moe_num_experts": 2, "moe_num_shared_experts": 2, "moe_k": 1, "vocab_size": 64,
}  # fmt: skip
KV_HEADS, HEAD_DIM = 2, 64
QKV = [8 * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
LAST_WINT4 = {"wint2": 1, "wint4": 2}
MAKE = {
    "wint2": ("wint2", "--wint4-layers", 2, "--effort", 1),
    "wint4": ("wint4", "--runtime", "fastdeploy"),
}
FORMS = pytest.mark.parametrize("form", MAKE)
WINT4_DOWN = "ernie.layers.1.mlp.experts.0.down_proj"
WINT2_UP, WINT2_DOWN = (f"ernie.layers.2.mlp.experts.1.{x}_proj" for x in ("up_gate", "down"))


def reshard(source: Path, out: Path, tp: int) -> Path:
    run_plan(make_reshard_plan(open_source(source), tp), out)
    return out


def lasting(folder: Path) -> dict[str, bytes]:
    """All files but those that name the folder and what it was made from."""
    named = ("README.md", "README.source.md", "ernie-quant.json", "SHA256SUMS")
    return {name: data for name, data in contents(folder).items() if name not in named}
