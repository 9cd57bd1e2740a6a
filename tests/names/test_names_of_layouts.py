"""The name table: the same from Paddle, PT and rank folders, biases, heads and VL models included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import same, tensors, write
from helpers.paths import GOLDEN
from helpers.tables import Tensors, golden, model, problems, resolved
from safetensors.torch import save_file

from ernie_quant import names

# --- biases, heads ---------------------------------------------------------------------------------------------------


def with_biases(family: str) -> tuple[dict[str, Any], Tensors]:
    """A golden PT model with a bias beside every linear of attention, FFN and experts."""
    config, table = golden(family, use_bias=True)
    torch.manual_seed(5)
    linears = [n for n in table if n.endswith("_proj.weight")]
    return config, table | {n.replace(".weight", ".bias"): torch.randn(table[n].shape[0]).bfloat16() for n in linears}


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_biases_survive_paddle_and_back(family: str, tmp_path: Path) -> None:
    config, table = with_biases(family)
    write(model(tmp_path / "biased", config, table), tmp_path / "paddle", "fastdeploy")
    write(tmp_path / "paddle", tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), table) == []


def test_fused_biases_are_q_then_k_then_v_and_gate_then_up(tmp_path: Path) -> None:
    config, table = with_biases("dense")
    write(model(tmp_path / "biased", config, table), tmp_path / "paddle", "fastdeploy")
    fused, p, q = tensors(tmp_path / "paddle"), "ernie.layers.1", "model.layers.1"
    qkv = torch.cat([table[f"{q}.self_attn.{x}_proj.bias"] for x in "qkv"])
    assert torch.equal(fused[f"{p}.self_attn.qkv_proj.bias"], qkv)
    assert fused[f"{p}.self_attn.qkv_proj.bias"].shape == (128 + 64 + 64,)
    gate_up = torch.cat([table[f"{q}.mlp.{x}_proj.bias"] for x in ("gate", "up")])
    assert torch.equal(fused[f"{p}.mlp.up_gate_proj.bias"], gate_up)


def test_a_bias_that_config_promises_is_missed(tmp_path: Path) -> None:
    config, table = with_biases("dense")
    del table["model.layers.0.mlp.down_proj.bias"]
    assert problems(tmp_path, config, table) == ["model.layers.0.mlp.down_proj.bias: is missing"]


def test_a_tied_head_is_copied_where_it_is_stored_and_not_invented_where_it_is_not(tmp_path: Path) -> None:
    config, table = golden("dense", "paddle")
    write(model(tmp_path / "with", config, table), tmp_path / "pt")
    found = tensors(tmp_path / "pt")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    del table["lm_head.weight"]
    write(model(tmp_path / "without", config, table), tmp_path / "pt_without")
    assert same(tensors(tmp_path / "pt_without"), found) == ["lm_head.weight"]


def test_an_untied_head_is_transposed_like_a_linear(tmp_path: Path) -> None:
    config, table = golden("moe_mtp", "paddle")
    assert table["lm_head.weight"].shape == (64, 256)
    write(model(tmp_path / "untied", config, table), tmp_path / "pt")
    assert torch.equal(tensors(tmp_path / "pt")["lm_head.weight"], table["lm_head.weight"].t())


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    config, table = golden("moe_mtp")
    del table["lm_head.weight"]
    assert problems(tmp_path, config, table) == ["lm_head.weight: is missing"]


# --- rank folders ----------------------------------------------------------------------------------------------------


def shares(config: Mapping[str, Any], name: str, stored: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """What each rank of a -TP repository holds of a Paddle tensor."""
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    if ".qkv_proj." in name:
        pieces = [p.chunk(ranks, -1) for p in stored.split([q, kv, kv], -1)]
        return [torch.cat([p[i] for p in pieces], -1) for i in range(ranks)]
    if ".up_gate_proj." in name:
        gate, up = (half.chunk(ranks, -1) for half in stored.chunk(2, -1))
        return [torch.cat([gate[i], up[i]], -1) for i in range(ranks)]
    if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
        return list(stored.chunk(ranks, 0))
    if name == "lm_head.weight":
        return list(stored.chunk(ranks, 0 if config["tie_word_embeddings"] else 1))
    if "mtp_linear_proj" in name:  # is_column in FastDeploy's ernie4_5_mtp.py
        return list(stored.chunk(ranks, 1))
    return [stored] * ranks  # norms, routers, routing biases


def rank_folders(family: str, folder: Path, ranks: int = 2) -> Path:
    config, table = golden(family, "paddle")
    split = {name: shares(config, name, t, ranks) for name, t in table.items()}
    for rank in range(ranks):
        model(folder / f"rank{rank}", config, {name: parts[rank] for name, parts in split.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
@pytest.mark.parametrize("family", ["dense", "moe", "moe_mtp"])
def test_rank_folders_are_merged_into_the_bytes_of_the_whole(family: str, runtime: str, tmp_path: Path) -> None:
    write(GOLDEN / family / "paddle", tmp_path / "whole", runtime)
    write(rank_folders(family, tmp_path / "tp2"), tmp_path / "merged", runtime)
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_tensor_that_one_rank_lacks_is_named_with_the_rank(tmp_path: Path) -> None:
    folder = rank_folders("dense", tmp_path / "tp2")
    table = tensors(folder / "rank1")
    del table["ernie.layers.0.self_attn.o_proj.weight"]
    save_file({n: t.contiguous() for n, t in table.items()}, folder / "rank1/model.safetensors")
    assert resolved(folder).problems == ["ernie.layers.0.self_attn.o_proj.weight: is missing in rank 1"]


def test_a_whole_tensor_in_a_rank_is_refused(tmp_path: Path) -> None:
    folder = rank_folders("dense", tmp_path / "tp2")
    table = tensors(folder / "rank0") | {
        "ernie.embed_tokens.weight": tensors(GOLDEN / "dense/paddle")["ernie.embed_tokens.weight"]
    }
    save_file({n: t.contiguous() for n, t in table.items()}, folder / "rank0/model.safetensors")
    assert resolved(folder).problems == ["ernie.embed_tokens.weight: (256, 64) is not V x H = (128, 64) in each of 2 ranks"]


# --- VL --------------------------------------------------------------------------------------------------------------


def test_nested_and_flat_vl_configs_give_one_table() -> None:
    nested, flat = resolved(GOLDEN / "vl/pt_resaved_by_transformers"), resolved(GOLDEN / "vl/paddle")
    assert "text_config" in json.loads((GOLDEN / "vl/pt_resaved_by_transformers/config.json").read_text())
    assert nested.problems == flat.problems == []
    assert {k: list(v) for k, v in nested.map.ids.items()} == {k: list(v) for k, v in flat.map.ids.items()}
    assert nested.map.dims == flat.map.dims
    assert list(nested.map.rows()) == list(flat.map.rows())


def test_text_experts_come_first_and_vision_experts_are_narrower(tmp_path: Path) -> None:
    weights = resolved(GOLDEN / "vl/paddle").weights
    found = {
        w.name.split(".")[5]: (w.role, w.view.shape)
        for w in weights
        if w.name.startswith("model.layers.1.mlp.experts.") and "up_proj" in w.name
    }
    assert found == {
        **{str(i): (names.EXPERT, (32, 256)) for i in (0, 1, 2, 3)},
        **{str(i): (names.VISION_EXPERT, (16, 256)) for i in (4, 5, 6, 7)},
    }


def test_vl_routers_are_not_transposed(tmp_path: Path) -> None:
    """Unlike those of text models."""
    write(GOLDEN / "vl/paddle", tmp_path / "pt")
    stored, found = tensors(GOLDEN / "vl/paddle"), tensors(tmp_path / "pt")
    for gate in ("gate.weight", "gate.weight_1"):
        assert stored[f"ernie.layers.1.mlp.{gate}"].shape == (256, 4)
        assert torch.equal(found[f"model.layers.1.mlp.{gate}"], stored[f"ernie.layers.1.mlp.{gate}"])
    bias = found["model.layers.1.mlp.moe_statics.e_score_correction_bias"]  # row 0 text, row 1 vision
    assert bias.shape == (2, 4)
    assert torch.equal(bias, stored["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"])


def test_a_text_expert_of_vision_width_is_refused(tmp_path: Path) -> None:
    config, table = golden("vl", "paddle")
    name = "ernie.layers.1.mlp.experts.{}.down_proj.weight"
    table[name.format(0)], table[name.format(4)] = table[name.format(4)], table[name.format(0)]
    assert problems(tmp_path, config, table) == [
        f"{name.format(0)}: (16, 256) is not M x H = (32, 256)",
        f"{name.format(4)}: (32, 256) is not M1 x H = (16, 256)",
    ]


def test_digits_that_are_no_numbers_are_letters() -> None:
    assert names.natural("a1²3.10") == ["a", 1, "²", 3, ".", 10, ""]
