"""Quantized results in a real runtime: transformers computes from them what it computes from the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.models import GOLDEN, dequantized, logits, write

from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import PlanError
from ernie_quant.plan import built_in, recipe

ALL = {"experts_only": False, "mtp": True, "keep_unfit": False}
EXPERTS = ALL | {"experts_only": True}


def model_of_128s(folder: Path) -> Path:
    """A small MoE made by transformers whose widths are all multiples of 128."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(1)
    config = Ernie4_5_MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        moe_layer_start_index=1, moe_layer_end_index=2, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    Ernie4_5_MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def check(source: Path, tmp_path: Path, rules: recipe.Recipe, runtime: str, at_most: float) -> None:
    """No logit differs from the dequantized checkpoint's, and none strays far from the source's (nothing is random)."""
    write(source, tmp_path / "out", runtime, recipe=rules)
    found = logits(tmp_path / "out", torch.bfloat16)
    assert torch.equal(found, logits(dequantized(tmp_path / "out", tmp_path / "plain"), torch.bfloat16))
    original = logits(source, torch.bfloat16)
    assert 0 < (found - original).square().sum() / original.square().sum() < at_most


# at_most: relative error of the logits, a few times what was measured; random experts give more than 1
@pytest.mark.parametrize(
    ("codec", "options", "at_most"),
    [
        (RoundToNearest(4, 32), EXPERTS, 0.2),
        (RoundToNearest(4, CHANNEL), EXPERTS, 0.2),
        (RoundToNearest(8, 32), ALL, 0.01),
        (RoundToNearest(8, CHANNEL), EXPERTS, 0.01),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
@pytest.mark.parametrize("family", ["moe", "moe_mtp"])
def test_integers_on_the_golden_models(family: str, codec, options: dict, at_most: float, tmp_path: Path) -> None:
    check(GOLDEN / family / "pt", tmp_path, built_in.one_codec("test", codec, **options), "vllm", at_most)


@pytest.mark.parametrize(
    ("codec", "options", "at_most"),
    [
        (RoundToNearest(4, 128), EXPERTS, 0.2),
        (RoundToNearest(4, 128), ALL, 0.2),
        (RoundToNearest(8, 128), ALL, 0.01),
        (RoundToNearest(2, 64), EXPERTS, 1.0),
        (Float8Block(), EXPERTS, 0.02),
        (Float8Block(), ALL, 0.02),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
def test_groups_and_blocks_of_128(codec, options: dict, at_most: float, tmp_path: Path) -> None:
    source = model_of_128s(tmp_path / "source")
    check(source, tmp_path, built_in.one_codec("test", codec, **options), "transformers", at_most)


def recipe_of(tmp_path: Path, *rules: str) -> recipe.Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text("".join(f"[[rule]]\ncodec = 'rtn'\n{rule}\n" for rule in rules))
    return recipe.read(path)


def test_two_bit_widths_in_one_checkpoint(tmp_path: Path) -> None:
    rules = recipe_of(tmp_path, "role = 'experts'", "role = 'attention'\nbits = 8", "match = 'shared_experts'\ngroup_size = 64")
    check(model_of_128s(tmp_path / "source"), tmp_path, rules, "transformers", 0.2)
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted((g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups.values()) == [
        (4, 64),
        (4, 128),
        (8, 128),
    ]


def test_experts_that_differ_between_layers_are_for_vllm_only(tmp_path: Path) -> None:
    """transformers would load them, and decode one of the layers wrongly without a word."""
    rules = recipe_of(tmp_path, "match = 'layers.1.mlp.experts'\nbits = 8", "role = 'experts'")
    source = model_of_128s(tmp_path / "source")
    with pytest.raises(PlanError, match="int4, group 128 and int8, group 128, of which transformers reads one only"):
        write(source, tmp_path / "out", "transformers", recipe=rules)
    write(source, tmp_path / "out", "vllm", recipe=rules)
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve" in card
    assert "transformers" not in card
