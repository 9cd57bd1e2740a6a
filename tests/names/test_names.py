"""The name table: total for every release, exact about what disagrees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import same, tensors, write
from helpers.paths import GOLDEN, MAKE_GEOMETRY
from helpers.tables import golden, model, problems, resolved, written

from ernie_quant import names
from ernie_quant.weights.plain import Resolved

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
        "stray: is unknown to this architecture, 1, in model.safetensors",
        "model.layers.1.input_layernorm.weight: is missing",
        "model.norm.weight: (63,) is not H = (64,)",
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
