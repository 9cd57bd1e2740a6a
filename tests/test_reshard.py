"""Tensor-parallel ranks of a prequantized checkpoint: every rank against a splitter written from the specification."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import GOLDEN, copy, invoke, random_model, same, tensors, write
from safetensors.torch import save_file
from test_run import Killed, contents
from test_verify import first_byte, poke, sealed

from ernie_quant.check.verify import verify
from ernie_quant.codecs import Codec
from ernie_quant.errors import CheckpointError, ErnieQuantError, PlanError, VerifyError
from ernie_quant.plan.built_in import fastdeploy_container
from ernie_quant.plan.make import make_plan
from ernie_quant.plan.reshard import make_reshard_plan
from ernie_quant.run import whole
from ernie_quant.run.shared import run_shared
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import fastdeploy
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files
from ernie_quant.weights import layouts
from ernie_quant.weights.stored import open_stored

Command = Callable[..., tuple[int, str, str]]
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


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def reshard(source: Path, out: Path, tp: int) -> Path:
    run_plan(make_reshard_plan(open_source(source), tp), out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src; for each form FORM/1, and FORM/2, FORM/4, FORM/back, each resharded from the one before; FORM/tp2 by --tp 2."""
    folder = tmp_path_factory.mktemp("reshard")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        random_model(folder / "src", layouts.PADDLE, "moe_mtp", **WIDTHS)
        (folder / "src/tokenizer.model").write_bytes(b"tokens")
        for form, (name, *options) in MAKE.items():
            (folder / form).mkdir()
            invoke(name, folder / "src", folder / form / "1", *options, "--quiet")
            for before, after, tp in (("1", "2", 2), ("2", "4", 4), ("4", "back", 1)):
                invoke("reshard", folder / form / before, folder / form / after, "--tp", tp, "--quiet")
            invoke(name, folder / "src", folder / form / "tp2", *options, "--tp", 2, "--quiet")
    return folder


def lasting(folder: Path) -> dict[str, bytes]:
    """All files but those that name the folder and what it was made from."""
    named = ("README.md", "README.source.md", "ernie-quant.json", "SHA256SUMS")
    return {name: data for name, data in contents(folder).items() if name not in named}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


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


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@FORMS
def test_config_lies_in_the_root_and_beside_the_mtp_ranks(form: str, size: int, folder: Path) -> None:
    out = folder / form / str(size)
    assert sorted(p.parent.relative_to(out).as_posix() for p in out.rglob("config.json")) == [".", "mtp"]
    said = {} if size == 1 else {"tensor_parallel_size": size}
    plain = {k: v for k, v in config(folder / form / "1").items() if k != "tensor_parallel_size"}
    assert config(out) == config(out / "mtp") == plain | said
    ranks = [f"rank{i}" for i in range(size)] if size > 1 else []  # never a lone rank0
    for place in (out, out / "mtp"):
        assert sorted(p.name for p in place.glob("rank*")) == ranks
        assert bool(list(place.glob("*.safetensors"))) == (size == 1)
    assert (out / "tokenizer.model").read_bytes() == b"tokens"


def test_the_readme_runs_the_right_number_of_ranks(folder: Path) -> None:
    text = (folder / "wint2/tp2/README.md").read_text()
    assert "FD_USE_MACHETE=0 python -m fastdeploy" in text
    assert "--tensor-parallel-size 2 " in text
    assert "FD_USE_MACHETE=0 is needed" in text  # the note of the first run
    assert "widths, heads and groups allow: 1, 2, 4." in text


def test_small_files_have_an_index_in_every_rank(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("reshard", folder / "wint2/1", out, "--tp", 2, "--max-shard-size", "300KB", "--quiet")
    for place in (out / "rank0", out / "rank1", out / "mtp/rank0", out / "mtp/rank1"):
        index = json.loads((place / "model.safetensors.index.json").read_text())
        files = sorted(p.name for p in place.glob("*.safetensors"))
        assert len(files) > 1
        assert sorted(set(index["weight_map"].values())) == files
        assert index["weight_map"].keys() == tensors(place).keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(place).values())
        where = {(name.rpartition(".")[0], file) for name, file in index["weight_map"].items()}
        assert len(where) == len({layer for layer, _ in where})  # a weight and its scales lie in one file
    assert same(tensors(out / "rank1"), tensors(folder / "wint2/2/rank1")) == []
    verify(out, folder / "src")
    assert lasting(reshard(out, tmp_path / "back", 1)) == lasting(folder / "wint2/1")


def test_nothing_is_left_beside_out_and_a_second_run_says_complete(folder: Path, command: Command, tmp_path: Path) -> None:
    name, *options = MAKE["wint2"]
    arguments = (name, folder / "src", tmp_path / "out", *options, "--tp", 2)
    assert command(*arguments)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/.ernie-quant").exists()
    before = contents(tmp_path / "out")
    assert command(*arguments) == (0, f"{tmp_path / 'out'}: complete\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == before
    code, _, err = command(*arguments[:-1], 4)  # another size is another plan
    assert (code, "holds the result of another plan" in err) == (1, True)
    assert contents(tmp_path / "out") == before


def test_a_second_reshard_says_complete(folder: Path, command: Command, tmp_path: Path) -> None:
    arguments = ("reshard", folder / "wint4/1", tmp_path / "out", "--tp", 2)
    assert command(*arguments)[0] == 0
    assert command(*arguments) == (0, f"{tmp_path / 'out'}: complete\n", "")


@pytest.mark.parametrize("calls", [1, 3, 5], ids=["while quantizing", "at the first rank", "at the last rank"])
def test_a_killed_run_with_tp_goes_on(calls: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files are quantized (model and MTP block), then four are shared out."""
    plan = make_plan(open_source(folder / "src"), runtime="fastdeploy", recipe=fastdeploy_container("wint2", 2, effort=1))
    original, done = whole.run_shard, []

    def run_shard(job: Any, **how: Any) -> Any:
        if len(done) == calls:
            raise Killed
        done.append(job.shard.filename)
        return original(job, **how)

    out = tmp_path / "wint2/tp2"
    out.parent.mkdir()
    options: dict[str, Any] = {"workers": 2, "restart": False, "progress": lambda _: None}
    with monkeypatch.context() as patched:
        patched.setattr(whole, "run_shard", run_shard)
        with pytest.raises(Killed):
            run_shared(plan, out, 2, **options)
    assert not (out / "ernie-quant.json").exists()
    calls, first = 100, list(done)
    monkeypatch.setattr(whole, "run_shard", run_shard)
    run_shared(plan, out, 2, **options)
    assert len(done) == len(set(done)) == 6, first  # nothing was written twice
    assert contents(out) == contents(folder / "wint2/tp2")
    assert [p.name for p in out.parent.iterdir()] == ["tp2"]


def test_a_published_checkpoint_is_resharded_and_verified(folder: Path, tmp_path: Path) -> None:
    """It has no manifest and no report; here with the ranks of 2 GPUs."""
    published = copy(folder / "wint2/2", tmp_path / "published")
    for name in ("report.json", "ernie-quant.json", "README.md"):
        (published / name).unlink()
    for tp, like in ((1, "1"), (4, "4")):
        out = tmp_path / like
        invoke("reshard", published, out, "--tp", tp, "--quiet")
        assert lasting(out) == {name: data for name, data in lasting(folder / "wint2" / like).items() if name != "report.json"}
        assert verify(out).quantized == verify(folder / "wint2" / like).quantized
        assert verify(out, folder / "src").against


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["2", "4", "tp2"])
@FORMS
def test_ranks_are_verified(form: str, size: str, folder: Path) -> None:
    found, whole = verify(folder / form / size), verify(folder / form / "1")
    assert (found.tensors, found.quantized) == (whole.tensors, whole.quantized)
    # attention and MLP of 3 layers and the MTP block, 2 x 2 experts and 2 times shared ones of two linears each
    assert found.quantized == 4 * 2 + 2 * 2 + (4 + 2) * 2
    assert verify(folder / form / size, folder / "src").against


@pytest.mark.parametrize("place", ["rank0", "rank1", "mtp/rank1"])
def test_one_changed_byte_of_one_rank_is_found(place: str, folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "wint2/2", tmp_path / "out")
    name = next(n for n in sorted(tensors(out / place)) if n.endswith("down_proj.quant_weight"))
    poke(out / place, name, bytes([first_byte(out / place, name) ^ 1]))
    with pytest.raises(VerifyError) as error:
        verify(out)
    file, weight = error.value.problems
    assert file.startswith(f"{place}/model.safetensors: its sha256 is ")
    assert weight.startswith(name.replace("quant_weight", "weight: its stored bytes are not those that were written"))
    sealed(out)
    verify(out)  # nothing but the source can tell
    with pytest.raises(VerifyError) as error:
        verify(out, folder / "src")
    (line,) = error.value.problems
    assert re.match(re.escape(name.replace("quant_weight", "weight")) + r": its (relative|squared) error is ", line)


def test_a_rank_that_lacks_a_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    out, name = copy(folder / "wint2/2", tmp_path / "out"), f"{WINT2_DOWN}.super_scales"
    save_file({n: t for n, t in tensors(out / "rank1").items() if n != name}, out / "rank1/model.safetensors")
    with pytest.raises(VerifyError) as error:
        verify(sealed(out))
    assert f"{name}: is in 1 of 2 ranks" in error.value.problems


# --- refused ---------------------------------------------------------------------------------------------------------


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


# --- what is left of other runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 1])
def test_restart_leaves_no_rank_folders_of_another_size(tp: int, folder: Path, tmp_path: Path) -> None:
    """FastDeploy would read them first."""
    out = reshard(folder / "wint4/1", tmp_path / "out", 4)
    run_plan(make_reshard_plan(open_source(folder / "wint4/1"), tp), out, restart=True)
    assert lasting(out) == lasting(folder / "wint4" / ("2" if tp == 2 else "1"))
    assert sorted(p.name for p in out.rglob("rank*")) == (sorted(2 * ["rank0", "rank1"]) if tp == 2 else [])


def test_a_rank_folder_that_the_manifest_does_not_know_is_found(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "wint4/2", tmp_path / "out")
    copy(out / "rank1", out / "rank2")
    with pytest.raises(VerifyError, match=r"rank2/model\.safetensors: is not in the manifest"):
        verify(out)


def test_kept_tensors_that_differ_between_ranks_are_found_without_the_source(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "wint4/2", tmp_path / "out")
    table = tensors(out / "rank1")
    table["ernie.norm.weight"] = table["ernie.norm.weight"] + 1
    save_file(table, out / "rank1/model.safetensors", metadata={"format": "np"})
    sealed(out)
    with pytest.raises(VerifyError, match=r"ernie\.norm\.weight: differs between rank0/.* and rank1/"):
        verify(out)


def test_tp_and_reshard_cut_the_same_files(folder: Path, tmp_path: Path) -> None:
    sizes = ("--max-shard-size", "1MB", "--quiet")
    invoke("wint4", folder / "src", tmp_path / "tp2", "--runtime", "fastdeploy", "--tp", 2, *sizes)
    invoke("reshard", folder / "wint4/1", tmp_path / "two", "--tp", 2, *sizes)
    assert lasting(tmp_path / "tp2") == lasting(tmp_path / "two")
    assert (tmp_path / "two/rank1/model.safetensors.index.json").exists()


def test_a_dry_run_refuses_a_size_that_does_not_fit(folder: Path, command: Command, tmp_path: Path) -> None:
    code, _, err = command("wint4", folder / "src", tmp_path / "out", "--runtime", "fastdeploy", "--tp", 16, "--dry-run")
    assert code == 1
    assert "cannot be shared by 16 ranks" in err


def test_bits_per_weight_count_weights_not_bytes(folder: Path) -> None:
    of = {size: re.search(r"([\d.]+) bits per weight", (folder / "wint4" / size / "README.md").read_text()) for size in "14"}
    assert of["1"]
    assert of["4"]
    assert float(of["1"][1]) <= float(of["4"][1]) < 1.1 * float(of["1"][1])  # norms, routers and row scales in every rank


def test_a_run_stopped_between_its_last_two_steps_leaves_nothing_in_the_end(folder: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", ("--runtime", "fastdeploy", "--tp", 2, "--quiet")
    invoke("wint4", folder / "src", out, *arguments)
    (out / ".ernie-quant").mkdir()
    copy(folder / "wint4/1", out / ".ernie-quant/unsplit")
    assert "complete" in invoke("wint4", folder / "src", out, *arguments)
    assert not (out / ".ernie-quant").exists()


def test_a_shared_result_names_the_source_and_not_what_was_made_in_between(folder: Path, tmp_path: Path) -> None:
    invoke("wint4", folder / "src", tmp_path / "out", "--runtime", "fastdeploy", "--tp", 2, "--quiet")
    found = json.loads((tmp_path / "out/ernie-quant.json").read_text())
    assert found["source_name"] == "src"
    assert {s for e in found["files"].values() for s in e.get("sources", ())} == {
        p.name for p in (folder / "src").glob("*.safetensors")
    }
    assert "src, quantized (wint4)" in (tmp_path / "out/README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
