"""Small models to quantize, with every width that vLLM's kernels ask for at TP 2, and weights that give telling logits.

hidden 256, heads of 128, two kv heads: each rank has whole 128x128 blocks of every linear, as Marlin and float8 want it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers.models import tensors
from helpers.paths import GOLDEN
from helpers.words import byte_tokenizer
from safetensors.torch import save_file

from ernie_quant import archs, names

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
EXPERTS = {"num_hidden_layers": 3, "moe_layer_end_index": 2, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 256}
VL_LAYERS = {"num_hidden_layers": 3, "moe_layer_end_index": [2, 2]}
VL = VL_LAYERS | {"moe_num_experts": [4, 4], "moe_intermediate_size": [512, 256], "im_patch_id": 1000}

# source -> the golden model whose config.json and name table it has, and what is changed in its config.json
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"num_hidden_layers": 2}),  # a tied head
    "moe": ("moe", EXPERTS | {"tie_word_embeddings": False}),  # two shared experts
    "wide": ("moe", EXPERTS | {"moe_intermediate_size": 512}),  # CUTLASS takes multiples of 256 per rank
    "narrow": ("moe", EXPERTS | {"moe_intermediate_size": 384}),
    "mtp": ("moe_mtp", EXPERTS),  # no shared experts
    "vl": ("vl", VL),
}


def make(source: str, folder: Path) -> Path:
    """Write the PT checkpoint `source` to `folder`."""
    golden, changes = SOURCES[source]
    config = json.loads((GOLDEN / golden / "paddle/config.json").read_text()) | SIZES | changes
    rows = archs.find(config).name_map(config, list(tensors(GOLDEN / golden / "paddle"))).rows()
    random = torch.Generator().manual_seed(7)
    table: dict[str, torch.Tensor] = {}
    for row in (r for r in rows if r.rule.need not in ("use_bias", "never")):
        for name, shape in zip(row.pt, row.shapes, strict=True):
            weight = _weight(name, shape, config["tie_word_embeddings"], random)
            table[name] = weight if row.rule.role == names.ROUTER else weight.to(torch.bfloat16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return byte_tokenizer(folder)  # for those that want to see a text


def _weight(name: str, shape: tuple[int, ...], tied: bool, random: torch.Generator) -> torch.Tensor:
    """Scaled so that every layer's output is about 1, and a logit about 2: what is wrong anywhere is seen at the end."""
    noise = torch.randn(shape, generator=random)
    if len(shape) == 1 or "e_score" in name:
        return 1 + 0.1 * noise if name.endswith("norm.weight") else 0.02 * noise
    if "embed_tokens" in name and not tied:
        return noise
    return noise * ((2 if "lm_head" in name or "embed_tokens" in name else 1) / shape[-1] ** 0.5)
