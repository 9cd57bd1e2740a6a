"""The name table: total for every release, exact about what disagrees, and the same from Paddle, PT and rank folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import GOLDEN, same, tensors, write
from safetensors.torch import save_file

from ernie_quant import names
from ernie_quant.errors import PlanError
from ernie_quant.plan.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.weights.plain import Resolved, resolve

Tensors = dict[str, torch.Tensor]


def golden(family: str, layout: str = "pt", **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """config.json (with `changes`; None removes a key) and tensors of a golden checkpoint."""
    config = json.loads((GOLDEN / family / layout / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    return config, tensors(GOLDEN / family / layout)


def model(folder: Path, config: Mapping[str, Any], table: Tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in table.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def resolved(folder: Path) -> Resolved:
    return resolve(open_source(folder))


def written(folder: Path, out: Path, runtime: str = "vllm") -> dict[str, Any]:
    """config.json of the conversion."""
    write(folder, out, runtime)
    return json.loads((out / "config.json").read_text())


# --- every release ---------------------------------------------------------------------------------------------------


def geometry(release: str, layout: str, out: Path) -> Resolved:
    arguments = [sys.executable, str(MAKE_GEOMETRY), release, str(out), "--format", layout]
    subprocess.run(arguments, check=True, capture_output=True)
    return resolved(out)


@pytest.mark.parametrize(
    ("release", "in_paddle", "in_pt"),
    [
        # per dense layer 6 tensors in Paddle, 9 in PT; embeddings and norm (and an untied head) around them
        ("0.3b", 18 * 6 + 2, 18 * 9 + 2),
        # 27 layers of 64 experts (2 or 3 tensors each), shared experts, router and bias; 9 or 12 tensors of the MTP block
        ("21b", 2 + 6 + 27 * (4 + 64 * 2 + 2 + 2) + 9, 2 + 9 + 27 * (6 + 64 * 3 + 3 + 2) + 12),
        ("300b", 3 + 3 * 6 + 51 * (4 + 64 * 2 + 2) + 9, 3 + 3 * 9 + 51 * (6 + 64 * 3 + 2) + 12),
        # 128 experts, two routers; 32 blocks of 12 tensors and 3 around them; 14 of the resampler and a norm after it
        ("vl-28b", 2 + 6 + 27 * (4 + 128 * 2 + 2 + 3) + 387 + 15, 2 + 9 + 27 * (6 + 128 * 3 + 3 + 3) + 387 + 15),
        ("vl-424b", 3 + 3 * 6 + 51 * (4 + 128 * 2 + 3) + 387 + 15, 3 + 3 * 9 + 51 * (6 + 128 * 3 + 3) + 387 + 15),
    ],
)
def test_the_table_is_total_for_every_release(release: str, in_paddle: int, in_pt: int, tmp_path: Path) -> None:
    paddle, pt = geometry(release, "paddle", tmp_path / "paddle"), geometry(release, "pt", tmp_path / "pt")
    assert paddle.problems == pt.problems == []
    shapes = {w.name: w.view.shape for w in pt.weights}
    assert len(shapes) == len(pt.weights) == in_pt
    assert {w.name: w.view.shape for w in paddle.weights} == shapes
    assert [w.name for w in paddle.weights] == [w.name for w in pt.weights]
    # every stored tensor is used, and by one row only
    assert all(w.sources == (w.name,) for w in pt.weights)
    row_of = {(source, w.row.paddle) for w in paddle.weights for source in w.sources}
    assert len(row_of) == len({source for source, _ in row_of}) == in_paddle


# --- what disagrees --------------------------------------------------------------------------------------------------


def problems(tmp_path: Path, config: Mapping[str, Any], table: Tensors) -> list[str]:
    """Lines of the refusal, which are those of `inspect` too."""
    folder = model(tmp_path / "bad", config, table)
    with pytest.raises(PlanError) as refused:
        make_plan(open_source(folder), runtime="vllm")
    assert refused.value.problems == resolved(folder).problems
    return refused.value.problems


def test_an_unknown_tensor_is_named_with_its_shape_and_file(tmp_path: Path) -> None:
    config, table = golden("moe")
    table["model.layers.0.mlp.extra.weight"] = torch.zeros(3, 4)
    assert problems(tmp_path, config, table) == [
        "model.layers.0.mlp.extra.weight: is unknown to this architecture, 3x4, in model.safetensors"
    ]


def test_a_layer_beyond_the_last_is_unknown(tmp_path: Path) -> None:
    config, table = golden("dense", num_hidden_layers=2)
    found = problems(tmp_path, config, table)
    assert len(found) == 9
    assert all(line.startswith("model.layers.2.") and "is unknown" in line for line in found)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config, table = golden("moe")
    del table["model.layers.2.mlp.experts.7.up_proj.weight"]
    assert problems(tmp_path, config, table) == ["model.layers.2.mlp.experts.7.up_proj.weight: is missing"]


def test_a_missing_fused_tensor_is_named_as_it_is_stored(tmp_path: Path) -> None:
    config, table = golden("moe", "paddle")
    del table["ernie.layers.0.self_attn.qkv_proj.weight"]
    assert problems(tmp_path, config, table) == ["ernie.layers.0.self_attn.qkv_proj.weight: is missing"]


@pytest.mark.parametrize(
    ("layout", "name", "line"),
    [
        # H 64, Q 4 x 32, KV 2 x 32, I 128 in the dense golden model
        ("pt", "model.layers.0.mlp.down_proj.weight", "(128, 64) is not H x I = (64, 128)"),
        ("pt", "model.layers.1.mlp.gate_proj.weight", "(64, 128) is not I x H = (128, 64)"),
        ("pt", "model.layers.1.mlp.up_proj.weight", "(64, 128) is not I x H = (128, 64)"),
        ("pt", "model.layers.0.self_attn.q_proj.weight", "(64, 128) is not Q x H = (128, 64)"),
        ("pt", "model.embed_tokens.weight", "(64, 256) is not V x H = (256, 64)"),
        ("paddle", "ernie.layers.0.mlp.down_proj.weight", "(64, 128) is not I x H = (128, 64)"),
        ("paddle", "ernie.layers.0.mlp.up_gate_proj.weight", "(256, 64) is not H x I+I = (64, 256)"),
        ("paddle", "ernie.layers.0.self_attn.qkv_proj.weight", "(256, 64) is not H x Q+KV+KV = (64, 256)"),
        ("paddle", "ernie.layers.0.self_attn.o_proj.weight", "(64, 128) is not Q x H = (128, 64)"),
    ],
)
def test_a_wrong_shape_is_shown_beside_the_right_one(layout: str, name: str, line: str, tmp_path: Path) -> None:
    config, table = golden("dense", layout)
    table[name] = table[name].t()
    assert problems(tmp_path, config, table) == [f"{name}: {line}"]


def test_a_wrong_k_proj_is_not_measured_by_the_sum_of_q_k_and_v(tmp_path: Path) -> None:
    config, table = golden("dense")
    name = "model.layers.0.self_attn.k_proj.weight"
    table[name] = torch.zeros(32, 64)
    assert problems(tmp_path, config, table) == [f"{name}: (32, 64) is not KV x H = (64, 64)"]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    config, table = golden("moe")
    table["stray"] = torch.zeros(1)
    table["model.norm.weight"] = torch.zeros(63)
    del table["model.layers.1.input_layernorm.weight"]
    assert problems(tmp_path, config, table) == [
        "model.layers.1.input_layernorm.weight: is missing",
        "model.norm.weight: (63,) is not H = (64,)",
        "stray: is unknown to this architecture, 1, in model.safetensors",
    ]


# --- MTP -------------------------------------------------------------------------------------------------------------

PROJ = "model.mtp_linear_proj.0.weight"


def test_an_untransposed_mtp_linear_proj_is_refused_by_name(tmp_path: Path) -> None:
    """A 300B PT file was once published with it."""
    config, table = golden("moe_mtp")
    table[PROJ] = table[PROJ].t()
    assert problems(tmp_path, config, table) == [
        f"{PROJ}: (128, 64) is not H x 2H = (64, 128): stored untransposed; --fix mtp_linear_proj repairs it"
    ]


def test_the_fix_repairs_an_untransposed_mtp_linear_proj(tmp_path: Path) -> None:
    config, table = golden("moe_mtp")
    table[PROJ] = table[PROJ].t()
    write(model(tmp_path / "bad", config, table), tmp_path / "pt", fixes=frozenset({"mtp_linear_proj"}))
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe_mtp/pt")) == []


def test_the_fix_leaves_a_correct_mtp_linear_proj_alone(tmp_path: Path) -> None:
    write(GOLDEN / "moe_mtp/paddle", tmp_path / "pt", fixes=frozenset({"mtp_linear_proj"}))
    assert same(tensors(tmp_path / "pt"), tensors(GOLDEN / "moe_mtp/pt")) == []


@pytest.mark.parametrize("said", [0, None])
def test_mtp_is_kept_though_config_does_not_announce_it(said: int | None, tmp_path: Path) -> None:
    config, table = golden("moe_mtp", num_nextn_predict_layers=said)
    source = model(tmp_path / "quiet", config, table)
    assert sum(w.role == names.MTP for w in resolved(source).weights) == 12
    write(source, tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), table) == []


def test_mtp_may_be_absent_though_config_announces_it(tmp_path: Path) -> None:
    """transformers drops the block when it saves, and leaves the config as it was."""
    config, table = golden("moe_mtp", num_nextn_predict_layers=1)
    rest = {name: t for name, t in table.items() if ".mtp_" not in name}
    assert len(table) - len(rest) == 12
    write(model(tmp_path / "resaved", config, rest), tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), rest) == []


def test_half_an_mtp_block_is_reported(tmp_path: Path) -> None:
    config, table = golden("moe_mtp")
    del table["model.mtp_emb_norm.0.weight"]
    assert problems(tmp_path, config, table) == ["model.mtp_emb_norm.0.weight: is missing"]


# --- shared experts, routing bias ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["vllm", "fastdeploy"])
@pytest.mark.parametrize(("family", "experts"), [("moe", 2), ("moe_mtp", 0)])
def test_the_number_of_shared_experts_is_written_even_if_config_left_it_out(
    family: str, experts: int, runtime: str, tmp_path: Path
) -> None:
    """Absent, transformers and vLLM assume 2 and initialise them at random."""
    source = model(tmp_path / "silent", *golden(family, moe_num_shared_experts=None))
    config = written(source, tmp_path / "out", runtime)
    assert config["moe_num_shared_experts"] == experts
    assert type(config["moe_num_shared_experts"]) is int


def test_null_shared_experts_are_written_as_zero(tmp_path: Path) -> None:
    config, table = golden("moe_mtp")
    config["moe_num_shared_experts"] = None
    assert written(model(tmp_path / "null", config, table), tmp_path / "out")["moe_num_shared_experts"] == 0


def test_shared_experts_that_config_promises_are_missed(tmp_path: Path) -> None:
    config, table = golden("moe_mtp", moe_num_shared_experts=2)
    found = problems(tmp_path, config, table)
    assert found[0] == "model.layers.1.mlp.shared_experts.gate_proj.weight: is missing"
    assert len(found) == 6  # three linears in two layers


def test_shared_experts_that_config_denies_are_unknown(tmp_path: Path) -> None:
    config, table = golden("moe", moe_num_shared_experts=0)
    found = problems(tmp_path, config, table)
    assert len(found) == 6
    assert all(".shared_experts." in line and "is unknown" in line for line in found)


BIAS = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"


def test_a_lost_routing_bias_is_reported(tmp_path: Path) -> None:
    config, table = golden("moe")
    del table[BIAS.format(1)], table[BIAS.format(2)]
    assert problems(tmp_path, config, table) == [f"{BIAS.format(i)}: is missing" for i in (1, 2)]


def test_a_model_that_says_so_has_no_routing_bias(tmp_path: Path) -> None:
    config, table = golden("moe", moe_use_aux_free=False)
    del table[BIAS.format(1)], table[BIAS.format(2)]
    write(model(tmp_path / "none", config, table), tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), table) == []


def test_a_stored_routing_bias_is_kept_whatever_config_says(tmp_path: Path) -> None:
    config, table = golden("moe", moe_use_aux_free=False)
    write(model(tmp_path / "some", config, table), tmp_path / "pt")
    assert same(tensors(tmp_path / "pt"), table) == []


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
