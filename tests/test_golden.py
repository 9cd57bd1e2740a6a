"""Golden checkpoints: the conversion gives the bytes of Baidu's own, and transformers computes their logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import FAMILIES, GOLDEN, config, copy, logits, same, tensors, write
from safetensors.torch import save_file

from ernie_quant.weights import layouts


def expected(case: str) -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / case / "expected_logits_fp32.npy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_paddle_becomes_pt_byte_for_byte(family: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / family / "pt")) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_paddle_to_pt_and_back_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "pt")
    write(tmp_path / "pt", tmp_path / "paddle", "fastdeploy")
    assert same(tensors(tmp_path / "paddle"), tensors(GOLDEN / family / "paddle")) == []


@pytest.mark.parametrize("family", ["dense", "moe", "moe_mtp"])
def test_a_pickle_gives_the_same_file_as_safetensors(family: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "a")
    write(GOLDEN / family / "paddle_pdparams", tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_both_bf16_tags_give_the_same_file(tmp_path: Path) -> None:
    tagged = tensors(GOLDEN / "moe/paddle")
    shutil.copytree(GOLDEN / "moe/paddle", tmp_path / "bf16", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tagged, tmp_path / "bf16/model.safetensors", metadata={"format": "np"})
    write(tmp_path / "bf16", tmp_path / "a")
    write(GOLDEN / "moe/paddle", tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_the_third_layout_has_the_same_values(tmp_path: Path) -> None:
    """paddleformers interleaves q, k and v per kv group and stores float32."""
    write(GOLDEN / "dense/paddleformers_native", tmp_path / "pt")
    found = {name: tensor.bfloat16() for name, tensor in tensors(tmp_path / "pt").items()}
    published = tensors(GOLDEN / "dense/pt")
    del published["lm_head.weight"]  # tied, and stored once in this layout
    found.pop("lm_head.weight", None)
    assert same(found, published) == []


def test_the_vision_prefix_of_transformers_is_accepted(tmp_path: Path) -> None:
    write(GOLDEN / "vl/pt_resaved_by_transformers", tmp_path / "pt")
    found = tensors(tmp_path / "pt")
    published = tensors(GOLDEN / "vl/pt")
    del published["lm_head.weight"]  # transformers drops the tied copy
    published = {n: t.float() for n, t in published.items()}
    assert same(found, published) == []


@pytest.mark.parametrize("family", ["dense", "moe", "moe_mtp"])
def test_config_json_is_the_published_one(family: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "pt")
    assert config(tmp_path / "pt") == config(GOLDEN / family / "pt")


def test_vl_config_is_the_flat_one_with_a_dtype(tmp_path: Path) -> None:
    write(GOLDEN / "vl/paddle", tmp_path / "pt")
    published = config(GOLDEN / "vl/pt") and json.loads((GOLDEN / "vl/pt/config.remote_style.json").read_text())
    del published["scale_qk_coeff"]  # a default of Baidu's class, not in the Paddle file
    assert config(tmp_path / "pt") == published | {"torch_dtype": "bfloat16"}


def test_nested_vl_config_becomes_flat_and_says_the_same(tmp_path: Path) -> None:
    write(GOLDEN / "vl/pt_resaved_by_transformers", tmp_path / "pt")
    found, published = config(tmp_path / "pt"), json.loads((GOLDEN / "vl/pt/config.remote_style.json").read_text())
    for key in ("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index", "im_patch_id",
                "freq_allocation", "rope_theta", "pixel_hidden_size", "spatial_conv_size", "temporal_conv_size", "model_type",
                "moe_k", "moe_num_shared_experts", "hidden_size", "head_dim", "rope_3d"):  # fmt: skip
        assert found.get(key) == published.get(key), key


@pytest.mark.parametrize("family", ["dense", "moe", "moe_mtp"])
def test_transformers_computes_the_logits_of_the_paddle_code(family: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "pt")
    assert (logits(tmp_path / "pt", case=family) - expected(family)).abs().max() < 1e-4


def test_a_pt_checkpoint_survives_paddle_and_back(tmp_path: Path) -> None:
    write(GOLDEN / "moe_hf/pt", tmp_path / "paddle", "fastdeploy")
    write(tmp_path / "paddle", tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe_hf/pt")) == []
    assert (logits(tmp_path / "pt", case="moe_hf") - expected("moe_hf")).abs().max() < 1e-4


def test_transformers_computes_the_vl_logits_with_its_own_config(tmp_path: Path) -> None:
    write(GOLDEN / "vl/paddle", tmp_path / "pt", vl_config="transformers")
    assert (logits(tmp_path / "pt", case="vl") - expected("vl")).abs().max() < 1e-4


def test_transformers_computes_the_logits_of_an_image(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    write(GOLDEN / "vl/paddle", tmp_path / "pt", vl_config="transformers")
    keys = ("input_ids", "pixel_values", "position_ids", "token_type_ids", "expected_logits_fp32")
    load = {k: torch.from_numpy(np.load(GOLDEN / f"vl/image_{k}.npy")) for k in keys}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "pt", dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(
            input_ids=load["input_ids"], pixel_values=load["pixel_values"], image_grid_thw=torch.tensor([[1, 4, 4]]),
            moe_mm_token_type_ids=load["token_type_ids"], position_ids=load["position_ids"].permute(2, 0, 1),
        ).logits  # fmt: skip
    assert (found - load["expected_logits_fp32"]).abs().max() < 1e-4


# Negative controls: the check above must see every accident that has happened to somebody.


def damaged(family: str, tmp_path: Path, change) -> float:
    """Max logit difference after `change(tensors)` of a converted checkpoint."""
    write(GOLDEN / family / "paddle", tmp_path / "pt")
    table = tensors(tmp_path / "pt")
    change(table)
    bad = copy(tmp_path / "pt", tmp_path / "bad")
    save_file({k: v.contiguous() for k, v in table.items()}, bad / "model.safetensors", metadata={"format": "pt"})
    return float((logits(bad, case=family) - expected(family)).abs().max())


def test_logits_see_swapped_gate_and_up(tmp_path: Path) -> None:
    def swap(table: dict[str, torch.Tensor]) -> None:
        gate, up = (f"model.layers.1.mlp.experts.0.{x}_proj.weight" for x in ("gate", "up"))
        table[gate], table[up] = table[up], table[gate]

    assert damaged("moe", tmp_path, swap) > 1e-3


def test_logits_see_an_untransposed_o_proj(tmp_path: Path) -> None:
    def transpose(table: dict[str, torch.Tensor]) -> None:
        table["model.layers.0.self_attn.o_proj.weight"] = table["model.layers.0.self_attn.o_proj.weight"].t()

    assert damaged("moe", tmp_path, transpose) > 1e-3


def test_logits_see_a_lost_routing_bias(tmp_path: Path) -> None:
    def lose(table: dict[str, torch.Tensor]) -> None:
        table["model.layers.1.mlp.moe_statics.e_score_correction_bias"] *= 0

    assert damaged("moe", tmp_path, lose) > 1e-3


def test_logits_see_a_router_rounded_to_bf16(tmp_path: Path) -> None:
    def round_router(table: dict[str, torch.Tensor]) -> None:
        for name in table:
            if name.endswith("mlp.gate.weight"):
                table[name] = table[name].bfloat16().float()

    assert damaged("moe", tmp_path, round_router) > 1e-4


def test_the_layout_is_recognised_by_names_not_by_config(tmp_path: Path) -> None:
    lying = copy(GOLDEN / "moe/paddle", tmp_path / "lying")
    table = config(lying)
    table["torch_dtype"] = table.pop("dtype")
    (lying / "config.json").write_text(json.dumps(table))
    assert layouts.layout_of(list(tensors(lying))) == layouts.PADDLE
    write(lying, tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe/pt")) == []
