"""Ranks that disagree, and numbers of ranks that do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import Command
from helpers.models import GOLDEN, copy, random_model, tensors
from helpers.ranks import MAKE, WIDTHS, WINT2_DOWN, WINT4_DOWN, reshard
from helpers.results import first_byte, poke
from safetensors.torch import save_file

from ernie_quant.errors import CheckpointError, ErnieQuantError, PlanError
from ernie_quant.planning.reshard import make_reshard_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (f"{WINT2_DOWN}.super_scales", "rank"),
        (f"{WINT2_DOWN}.code_scale", "rank"),
        (f"{WINT4_DOWN}.weight_scale", "rank"),
        ("ernie.layers.0.self_attn.o_proj.weight_scale", "rank"),
        ("ernie.norm.weight", "rank"),
        ("ernie.layers.1.mlp.gate.weight", "rank"),
        ("ernie.layers.2.mlp.moe_statics.e_score_correction_bias", "rank"),
        ("ernie.mtp_emb_norm.0.weight", "mtp/rank"),
    ],
)
def test_ranks_that_disagree_about_what_all_of_them_have_are_not_merged(
    part: str, place: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    source = copy(folder / "wint2/2", tmp_path / "src")
    poke(source / f"{place}1", part, bytes([first_byte(source / f"{place}1", part) ^ 1]))
    code, out, err = command("reshard", source, tmp_path / "out", "--tp", 1)
    line = f"{part}: differs between rank0/model.safetensors and rank1/model.safetensors; every rank must have the same"
    assert (code, out, err) == (1, "", f"error: {line}\n")
    assert not (tmp_path / "out/ernie-quant.json").exists()


def test_ranks_that_disagree_about_a_kv_head_they_share_are_not_merged(folder: Path, tmp_path: Path) -> None:
    source, name = copy(folder / "wint4/4", tmp_path / "src"), "ernie.layers.0.self_attn.qkv_proj.weight_scale"
    table = tensors(source / "rank3")
    table[name][-1] *= 2  # the last channel of v, which rank 2 has too
    save_file(table, source / "rank3/model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: differs between rank2/") + ".* and rank3/"):
        reshard(source, tmp_path / "out", 1)


@pytest.mark.parametrize("change", [lambda t: torch.cat([t, t]), lambda t: t[:8].clone(), lambda t: t.flatten()])
def test_ranks_of_different_shapes_are_refused_by_name(
    change: Callable[[torch.Tensor], torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    source, name = copy(folder / "wint2/2", tmp_path / "src"), f"{WINT2_DOWN}.quant_weight"
    table = tensors(source / "rank1")
    table[name] = change(table[name])
    save_file(table, source / "rank1/model.safetensors")
    with pytest.raises(PlanError) as error:
        make_reshard_plan(open_source(source), 1)
    assert error.value.problems == [f"{name}: is U8 (64, 512) in rank 0, U8 {tuple(table[name].shape)} in rank 1"]


@pytest.mark.parametrize(
    ("form", "tp", "line"),
    [
        ("wint2", 8, f"{WINT2_DOWN}.weight: 512 inputs in multiples of 128 cannot be shared by 8 ranks; 1, 2, 4 would do"),
        ("wint2", 3, "attention: 8 heads and 2 kv heads cannot be shared by 3 ranks"),
        ("wint2", 3, f"{WINT2_DOWN}.weight: 512 inputs in multiples of 128 cannot be shared by 3 ranks; 1, 2, 4 would do"),
        ("wint2", 3, "embeddings: 64 tokens cannot be shared by 3 ranks"),
        ("wint4", 16, f"{WINT4_DOWN}.weight: 512 inputs in multiples of 64 cannot be shared by 16 ranks; 1, 2, 4, 8 would do"),
        ("wint4", 16, "attention: 8 heads and 2 kv heads cannot be shared by 16 ranks"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(
    form: str, tp: int, line: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    code, out, err = command("reshard", folder / form / "1", tmp_path / "out", "--tp", tp)
    assert (code, out) == (1, "")
    assert f"cannot be resharded to {tp} rank(s)\n" in err
    assert f"  {line}\n" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "tp", "fits"), [("wint2", 8, "1, 2, 4"), ("wint2", 3, "1, 2, 4"), ("wint4", 16, "1, 2, 4, 8")])
def test_tp_that_does_not_fit_is_refused_before_anything_is_written(
    form: str, tp: int, fits: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    name, *options = MAKE[form]
    code, out, err = command(name, folder / "src", tmp_path / "out", *options, "--tp", tp)
    assert (code, out) == (1, "")
    assert err.endswith(f"cannot be shared by {tp} ranks; sizes that fit its heads, widths and groups: {fits}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_does_not_fit_is_noticed_before_hours_of_work(command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | {"vocab_size": 66})
    code, _, err = command("wint4", source, tmp_path / "out", "--runtime", "fastdeploy", "--tp", 4)
    assert (code, err.strip().endswith("groups: 1, 2")) == (1, True)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_what_is_not_fastdeploys_or_not_quantized_is_refused(command: Command, tmp_path: Path) -> None:
    assert command("wint4", GOLDEN / "moe/paddle", tmp_path / "vllm", "--group-size", 32)[0] == 0
    for source, words in (
        (tmp_path / "vllm", "is not FastDeploy's; only its checkpoints are stored per rank"),
        (GOLDEN / "moe/paddle", "is not quantized (config.json has no quantization_config); convert it"),
        (GOLDEN / "moe/pt", "is not quantized (config.json has no quantization_config); convert it"),
    ):
        code, out, err = command("reshard", source, tmp_path / "out", "--tp", 2)
        assert (code, out, err) == (1, "", f"error: {source}: {words}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tp", [0, 65])
def test_two_for_a_size_that_is_none(tp: int, folder: Path, command: Command, tmp_path: Path) -> None:
    assert command("reshard", folder / "wint2/1", tmp_path / "out", "--tp", tp)[0] == 2


def test_a_dry_run_writes_nothing(folder: Path, command: Command, tmp_path: Path) -> None:
    code, out, err = command("reshard", folder / "wint2/1", tmp_path / "out", "--tp", 2, "--dry-run", "--json")
    assert (code, err) == (0, "")
    planned = json.loads(out)
    assert (planned["status"], planned["files"], planned["tp_sizes"]) == ("planned", 4, [1, 2, 4])
    assert planned["bytes_out"] == sum(t.nbytes for p in (folder / "wint2/2").rglob("rank*") for t in tensors(p).values())
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_plan_is_an_error_of_ours(folder: Path) -> None:
    with pytest.raises(ErnieQuantError):
        make_reshard_plan(open_source(folder / "src"), 2)
