"""Tensor-parallel ranks of a prequantized checkpoint: every rank has its share, and nothing is lost on the way back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import config, invoke, random_model, same, tensors, write
from helpers.ranks import FORMS, HEAD_DIM, KV_HEADS, LAST_WINT4, QKV, WINT2_DOWN, WINT2_UP, WINT4_DOWN, Tensors, lasting, reshard

from ernie_quant.codecs import Codec
from ernie_quant.planning.built_in import fastdeploy_container
from ernie_quant.runtimes import fastdeploy
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files
from ernie_quant.weights import layouts
from ernie_quant.weights.stored import open_stored

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- without loss ----------------------------------------------------------------------------------------------------


@FORMS
def test_from_1_to_2_to_4_and_back_to_1_gives_the_same_files(form: str, folder: Path) -> None:
    assert lasting(folder / form / "back") == lasting(folder / form / "1")
    assert {"model.safetensors", "mtp/model.safetensors", "config.json", "report.json", "tokenizer.model"} <= lasting(
        folder / form / "back"
    ).keys()


@FORMS
def test_from_1_to_4_is_from_1_to_2_to_4(form: str, folder: Path, tmp_path: Path) -> None:
    assert lasting(reshard(folder / form / "1", tmp_path / "out", 4)) == lasting(folder / form / "4")


@FORMS
def test_from_4_to_2_is_from_1_to_2(form: str, folder: Path, tmp_path: Path) -> None:
    assert lasting(reshard(folder / form / "4", tmp_path / "out", 2)) == lasting(folder / form / "2")


@FORMS
def test_tp_of_a_quantizing_command_is_reshard_of_the_whole(form: str, folder: Path) -> None:
    assert lasting(folder / form / "tp2") == lasting(folder / form / "2")


@FORMS
def test_the_decoded_weights_are_the_same_for_every_size(form: str, folder: Path) -> None:
    found = []
    for size in ("1", "2", "4"):
        stored, problems = open_stored(open_source(folder / form / size), fastdeploy)
        assert problems == []
        with Files() as files:
            found.append({s.name: s.read(files, (0, s.shape[0])) for s in stored})
    assert same(found[0], found[1]) == same(found[0], found[2]) == []
    assert found[0][f"{WINT2_UP}.weight"].shape == (1024, 512)


@FORMS
def test_a_ranked_checkpoint_is_dequantized_to_the_bytes_of_the_whole(form: str, folder: Path, tmp_path: Path) -> None:
    for size in ("1", "4"):
        invoke("dequantize", folder / form / size, tmp_path / size, "--to", "pt", "--quiet")
    assert lasting(tmp_path / "4") == lasting(tmp_path / "1")
    assert "tensor_parallel_size" not in config(tmp_path / "4")


# --- the splitter: the specification, nothing of ranks.py ------------------------------------------------------------


def codec_of(layer: str, form: str) -> Codec:
    """By "Which models" and config.json of the specification."""
    expert = re.search(r"layers\.(\d+)\.mlp\.experts\.", layer)
    if not expert:
        return fastdeploy.WINT8
    return fastdeploy.WINT4 if int(expert[1]) <= LAST_WINT4[form] else fastdeploy.WINT2


def decoded(folders: list[Path], form: str) -> Tensors:
    """What FastDeploy would see in these folders and nowhere else: [in, out] under the names of the plain checkpoint."""
    stored = {name: tensor for folder in folders for name, tensor in tensors(folder).items()}
    layers = {name.rpartition(".")[0] for name in stored if name.endswith(".quant_weight")}
    found = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in layers}
    for layer in layers:
        mine = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] == layer}
        codec = codec_of(layer, form)
        found[f"{layer}.weight"] = codec.decode(fastdeploy.unpack(f"{layer}.weight", codec, mine)).t()
    return found


def share(name: str, whole: torch.Tensor, rank: int, of: int) -> torch.Tensor:
    """Rank `rank`'s part of a weight [in, out]; vectors, routers and their biases are everybody's."""
    if ".qkv_proj." in name:
        q, k, v = whole.split(QKV, 1)
        kv_shares = min(of, KV_HEADS)
        heads = [x.chunk(kv_shares, 1)[rank * kv_shares // of] for x in (k, v)]
        return torch.cat([q.chunk(of, 1)[rank], *heads], 1)
    if ".up_gate_proj." in name:
        return torch.cat([half.chunk(of, 1)[rank] for half in whole.chunk(2, 1)], 1)
    if name.endswith((".o_proj.weight", ".down_proj.weight", ".embed_tokens.weight")):
        return whole.chunk(of, 0)[rank]
    if name.startswith("lm_head.") or ".mtp_linear_proj." in name:  # a bias goes with its columns
        return whole.chunk(of, -1)[rank]
    return whole


@pytest.mark.parametrize("of", [2, 4])
@FORMS
def test_every_rank_alone_has_its_share_of_the_whole(form: str, of: int, folder: Path) -> None:
    whole = decoded([folder / form / "1", folder / form / "1/mtp"], form)
    out = folder / form / str(of)
    for rank in range(of):
        mine = decoded([out / f"rank{rank}", out / f"mtp/rank{rank}"], form)
        wanted = {name: share(name, weight, rank, of).contiguous() for name, weight in whole.items()}
        assert same({name: w.contiguous() for name, w in mine.items()}, wanted) == []


def test_shapes_of_a_rank_by_hand(folder: Path) -> None:
    found = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in tensors(folder / "wint2/4/rank3").items()}
    expected = {
        f"{WINT2_UP}.quant_weight": ("uint8", (512 // 4, 2 * 128)),
        f"{WINT2_UP}.weight_scale": ("uint8", (512 // 128, 2 * 128)),
        f"{WINT2_UP}.super_scales": ("bfloat16", (2 * 128,)),
        f"{WINT2_DOWN}.quant_weight": ("uint8", (128 // 4, 512)),
        f"{WINT2_DOWN}.weight_scale": ("uint8", (1, 512)),
        f"{WINT2_DOWN}.code_zp": ("float32", (512,)),
        f"{WINT4_DOWN}.quant_weight": ("int8", (512 // 2, 128)),
        f"{WINT4_DOWN}.weight_scale": ("bfloat16", (512,)),
        # 2 of 8 heads, and one whole kv head though there are 2 for 4 ranks
        "ernie.layers.0.self_attn.qkv_proj.quant_weight": ("int8", (2 * 64 + 64 + 64, 512)),
        "ernie.layers.0.self_attn.o_proj.quant_weight": ("int8", (512, 2 * 64)),
        "ernie.layers.1.mlp.shared_experts.down_proj.quant_weight": ("int8", (512, 1024 // 4)),
        "ernie.embed_tokens.weight": ("bfloat16", (16, 512)),
        "lm_head.weight": ("bfloat16", (512, 16)),
        "ernie.layers.1.mlp.gate.weight": ("float32", (512, 2)),
        "ernie.norm.weight": ("bfloat16", (512,)),
    }
    assert {name: found[name] for name in expected} == expected
    mtp = tensors(folder / "wint2/4/mtp/rank3")
    assert mtp["ernie.mtp_linear_proj.0.weight"].shape == (1024, 128)
    assert all(".mtp_" in name for name in mtp)
    assert not any(".mtp_" in name for name in found)


def test_scales_of_shared_rows_are_copied_and_those_of_columns_are_dealt_out(folder: Path) -> None:
    ranks = [tensors(folder / f"wint2/4/rank{i}") for i in range(4)]
    whole = tensors(folder / "wint2/1")
    for part in ("super_scales", "code_scale", "code_zp"):
        assert all(torch.equal(r[f"{WINT2_DOWN}.{part}"], whole[f"{WINT2_DOWN}.{part}"]) for r in ranks)
        gate, up = whole[f"{WINT2_UP}.{part}"].chunk(2)
        assert torch.equal(torch.cat([r[f"{WINT2_UP}.{part}"][:128] for r in ranks]), gate)
        assert torch.equal(torch.cat([r[f"{WINT2_UP}.{part}"][128:] for r in ranks]), up)


def test_ranks_that_share_a_kv_head_have_the_same_bytes_of_it(folder: Path) -> None:
    name = "ernie.layers.0.self_attn.qkv_proj.weight_scale"
    kv = [tensors(folder / f"wint4/4/rank{i}")[name][2 * HEAD_DIM :] for i in range(4)]
    assert torch.equal(kv[0], kv[1])
    assert torch.equal(kv[2], kv[3])
    assert not torch.equal(kv[0], kv[2])


def test_odd_numbers_of_heads_that_share_one_kv_head(tmp_path: Path) -> None:
    """76 heads and 1 kv head: no share of the fused tensor is a power of two."""
    heads: dict[str, Any] = {"num_attention_heads": 76, "num_key_value_heads": 1, "head_dim": 64}
    widths: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "moe_intermediate_size": 256, "moe_num_experts": 2}
    source = random_model(tmp_path / "src", layouts.PADDLE, "moe", **heads, **widths, moe_num_shared_experts=0)
    write(source, tmp_path / "1", "fastdeploy", recipe=fastdeploy_container("wint4", None))
    reshard(reshard(tmp_path / "1", tmp_path / "4", 4), tmp_path / "back", 1)
    assert lasting(tmp_path / "back") == lasting(tmp_path / "1")
