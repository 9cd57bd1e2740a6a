"""W4A8C8 for FastDeploy: decoded by the specification, shared among ranks, verified, and refused where it cannot be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import w4a8
from helpers.commands import Command
from helpers.containers import Arrays, read_file, read_folder, report
from helpers.disk import no_waiting
from helpers.models import config, copy, invoke, random_model
from helpers.nights import job_file
from helpers.ranks import lasting, reshard
from helpers.results import edit, poke, refused, sealed
from helpers.w4a8 import DOWN, HEAD_DIM, KEYS, KV_HEADS, QKV, UP, VALUES
from helpers.words import byte_tokenizer

import ernie_quant
from ernie_quant.check.verify import verify
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.rtn_kv import CachedRoundToNearest
from ernie_quant.codecs.w4a8 import Weight4Activation8
from ernie_quant.errors import PlanError
from ernie_quant.nightly.job import read_job
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.runtimes import Place, Spread, fastdeploy
from ernie_quant.sources import open_source

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src with an MTP block; out, and the same for 4 ranks, calibrated; given: of statistics that are given."""
    folder = tmp_path_factory.mktemp("w4a8")
    with no_waiting():
        w4a8.model(folder / "src", "moe_mtp")
        w4a8.quantized(folder / "src", folder / "out")
        w4a8.quantized(folder / "src", folder / "tp4", "--tp", 4)
        w4a8.with_statistics(folder / "src", folder / "given")
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path) -> Arrays:
    return read_folder(folder / "out")


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_eight_codes_by_hand() -> None:
    """Rows 2j and 2j + 1 of a column are a byte, the first in the low nibble; the scale is what 7 stands for."""
    codes = torch.tensor([[1, -2, 7, -7], [0, 3, -1, 0]], dtype=torch.int8)
    encoded = {"codes": codes, "scale": torch.tensor([[0.5], [2.0]]), "activation_scale": torch.tensor([3.0])}
    parts = fastdeploy.pack("x.down_proj.weight", Weight4Activation8(), encoded)
    assert parts["x.down_proj.quant_weight"].view(torch.uint8).tolist() == [[0xE1, 0x30], [0x97, 0x0F]]
    assert parts["x.down_proj.weight_scale"].tolist() == [3.5, 14.0]
    again = fastdeploy.unpack(
        "x.down_proj.weight", Weight4Activation8(), {**parts, "x.down_proj.activation_scale": torch.ones(1)}
    )
    assert torch.equal(again["codes"], codes)
    assert again["scale"].tolist() == [[0.5], [2.0]]


def test_bytes_are_those_of_the_golden_file(folder: Path, golden_value: Callable[[str, Any], Any]) -> None:
    """Of scales that are given: no text, no matrix of inputs, and so the same on every machine."""
    found = hashlib.sha256((folder / "given/model.safetensors").read_bytes()).hexdigest()
    assert golden_value("w4a8 container, model.safetensors", found) == found


@pytest.mark.parametrize("out", ["out", "given"])
def test_every_linear_decodes_as_the_specification_says(out: str, folder: Path) -> None:
    """Its error is the reported one: that of rounding, or more where a calibrated weight makes up for others before it."""
    source, rows, stored = read_file(folder / "src/model.safetensors"), report(folder / out), read_folder(folder / out)
    layers = {name.removesuffix(".quant_weight") for name in stored if name.endswith(".quant_weight")}
    assert len([layer for layer in layers if ".experts." in layer]) == 2 * 2 * 2
    for layer in sorted(layers):
        weight, decoded = w4a8.plain(source[f"{layer}.weight"]).astype(float), w4a8.decode(layer, stored).astype(float)
        error = ((weight - decoded) ** 2).sum() / (weight**2).sum()
        assert error == pytest.approx(rows[f"{layer}.weight"]["rel_error"], rel=1e-6), layer
        assert error < (0.02 if ".experts." in layer else 2e-4) or out == "out"


@pytest.mark.parametrize("layer", [UP, DOWN])
def test_the_kernel_computes_the_layer(layer: str, folder: Path) -> None:
    """Rotated inputs times rotated codes are inputs times the weight: a factor of 128 would show, and a transposed H."""
    weight = w4a8.plain(read_file(folder / "src/model.safetensors")[f"{layer}.weight"]).astype(float)
    stored = read_folder(folder / "given")
    scale = float(stored[f"{layer}.activation_scale"][0])
    inputs = np.random.default_rng(0).standard_normal((64, len(weight)))
    seen = w4a8.rotated(inputs.T).T if layer == DOWN else inputs
    inputs *= scale / np.abs(seen).max()
    exact, found = inputs @ weight, w4a8.product(layer, stored, inputs)
    assert ((found - exact) ** 2).sum() / (exact**2).sum() < 0.02
    of_codes = inputs @ w4a8.decode(layer, stored).astype(float)
    assert ((found - of_codes) ** 2).sum() / (of_codes**2).sum() < 5e-4


def test_nothing_else_is_stored_and_kept_tensors_are_the_source_s(folder: Path, stored: Arrays) -> None:
    source = read_file(folder / "src/model.safetensors")
    linears = {name for name in source if name.endswith("_proj.weight")}
    kept = source.keys() - linears
    parts = {f"{name.removesuffix('.weight')}.{part}" for name in linears for part in ("quant_weight", "weight_scale")}
    scales = {f"{name.removesuffix('.weight')}.activation_scale" for name in linears if ".experts." in name}
    cache = {f"ernie.layers.{n}.self_attn.cache{x}_matmul.activation_scale" for n in range(3) for x in "kv"}
    assert stored.keys() == kept | parts | scales | cache
    assert all(np.array_equal(stored[name], source[name]) for name in kept)
    assert {stored[name].dtype.str[1:] for name in scales | cache} == {"f4"}
    assert {stored[name].shape for name in scales} == {(1,)}
    assert {stored[name].shape for name in cache} == {(KV_HEADS * HEAD_DIM,)}


def test_another_block_is_another_rotation(folder: Path, tmp_path: Path) -> None:
    out = w4a8.quantized(folder / "src", tmp_path / "out", "--hadamard-block-size", 256)
    stored = read_folder(out)
    assert config(out)["quantization_config"]["hadamard_block_size"] == 256
    weight = w4a8.plain(read_file(folder / "src/model.safetensors")[f"{DOWN}.weight"]).astype(float)
    error = ((w4a8.decode(DOWN, stored, 256) - weight) ** 2).sum() / (weight**2).sum()
    assert error == pytest.approx(report(out)[f"{DOWN}.weight"]["rel_error"], rel=1e-6)
    verify(out, folder / "src")


def test_scales_are_those_of_the_statistics(folder: Path) -> None:
    source, given = read_file(folder / "src/model.safetensors"), read_folder(folder / "given")
    linears = [name for name in source if name.endswith("_proj.weight")]
    for layer in (UP, DOWN):
        assert given[f"{layer}.activation_scale"].tolist() == [1.0 + linears.index(f"{layer}.weight")]
    assert given[KEYS].tolist() == given[VALUES].tolist() == [n + 0.5 for n in range(128)]


# --- config.json -----------------------------------------------------------------------------------------------------


def test_config_json_says_what_the_loader_reads(folder: Path) -> None:
    found = config(folder / "out")
    assert found["is_quantized"] is True
    assert found["quantization_config"] == {
        "quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "w4a8", "kv_cache_quant_type": "int8",
        "is_quantized": True, "is_permuted": False, "hadamard_block_size": 128,
    }  # fmt: skip
    added = {"quantization_config", "is_quantized"}
    assert {k: v for k, v in found.items() if k not in added} == config(folder / "src")


def test_it_is_run_without_a_draft_model(folder: Path) -> None:
    """The MTP block has no cache scales."""
    (named,) = fastdeploy.commands(Place("out"), config(folder / "tp4"), Spread(4))
    assert named[0] == "FastDeploy"
    assert "FD_USE_MACHETE=0 python -m fastdeploy" in named[1]
    assert "--tensor-parallel-size 4" in named[1]
    notes = json.loads((folder / "out/report.json").read_text())["notes"]
    assert any("FastDeploy does not load it as a draft model" in note for note in notes)


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_rank_folders_are_those_of_a_reshard_and_make_the_whole_again(folder: Path, tmp_path: Path) -> None:
    there = lasting(reshard(folder / "out", tmp_path / "ranks", 4))
    here = lasting(folder / "tp4")
    assert {name for name in there if there[name] != here.get(name)} <= {"report.json"}
    assert there.keys() == here.keys()
    whole, out = lasting(reshard(folder / "tp4", tmp_path / "whole", 1)), lasting(folder / "out")
    assert whole["model.safetensors"] == out["model.safetensors"]
    assert whole["mtp/model.safetensors"] == out["mtp/model.safetensors"]
    verify(folder / "tp4")


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_has_its_heads_of_the_cache_and_its_blocks_of_a_rotation(rank: int, folder: Path, stored: Arrays) -> None:
    mine = read_folder(folder / f"tp4/rank{rank}")
    head = slice(rank // 2 * HEAD_DIM, (rank // 2 + 1) * HEAD_DIM)
    for name in (KEYS, VALUES):
        assert np.array_equal(mine[name], stored[name][head])
    for layer in (UP, DOWN):
        assert np.array_equal(mine[f"{layer}.activation_scale"], stored[f"{layer}.activation_scale"])
    rows = slice(128 * rank, 128 * (rank + 1))
    assert np.array_equal(w4a8.decode(DOWN, mine), w4a8.decode(DOWN, stored)[rows])
    gate, up = np.split(w4a8.decode(UP, stored), 2, axis=1)
    assert np.array_equal(w4a8.decode(UP, mine), np.hstack([gate[:, rows], up[:, rows]]))
    q, k, v = np.split(w4a8.decode(QKV, stored), [512, 640], axis=1)
    assert np.array_equal(w4a8.decode(QKV, mine), np.hstack([q[:, rows], k[:, head], v[:, head]]))


def test_a_rank_has_whole_blocks(folder: Path, command: Command, tmp_path: Path) -> None:
    """512 inputs of down_proj are 2 blocks of 256."""
    plan = make_plan(open_source(folder / "src"), runtime="fastdeploy", recipe=_recipe(256), calibration=_calibration())
    assert plan.tp_sizes == (1, 2)
    options = ("--hadamard-block-size", 256, "--calibration", "auto", "--tp", 4, "--dry-run")
    code, _, err = command("w4a8", folder / "src", tmp_path / "out", *options)
    assert (code, err.splitlines()[0].split(": ", 2)[2]) == (
        1, "cannot be shared by 4 ranks; sizes that fit its heads, widths and groups: 1, 2",
    )  # fmt: skip


# --- verify ----------------------------------------------------------------------------------------------------------


def test_it_is_verified_with_and_without_its_source(folder: Path) -> None:
    # q|k|v, o of 3 layers and the MTP block; a dense FFN, 2 shared, that of MTP; 2 layers of 2 experts
    linears = 2 * 4 + 2 * 4 + 2 * 2 * 2
    assert verify(folder / "out").quantized == linears
    assert verify(folder / "out", folder / "src").quantized == linears


@pytest.mark.parametrize("name", [f"{DOWN}.quant_weight", f"{DOWN}.weight_scale", f"{UP}.activation_scale", KEYS, VALUES])
def test_a_changed_byte_is_found_and_named(name: str, folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "out", tmp_path / "out")
    poke(out, name, bytes([read_folder(out)[name].view(np.uint8).reshape(-1)[0] ^ 1]))
    file, weight = refused(out)
    assert file.startswith("model.safetensors: its sha256 is ")
    assert weight.startswith(f"{QKV if name in (KEYS, VALUES) else name.rpartition('.')[0]}.weight: ")


@pytest.mark.parametrize("name", [f"{DOWN}.quant_weight", f"{DOWN}.weight_scale"])
def test_a_changed_weight_differs_from_the_source(name: str, folder: Path, tmp_path: Path) -> None:
    """Though the manifest says it was always so."""
    out = copy(folder / "out", tmp_path / "out")
    changed = read_folder(out)[name].view(np.uint8).reshape(-1)[:4] ^ np.uint8(0x13)
    poke(out, name, changed.tobytes())
    (line,) = refused(sealed(out), folder / "src")
    assert line.startswith(f"{DOWN}.weight: its relative error is ")


@pytest.mark.parametrize(("name", "bits"), [(f"{DOWN}.activation_scale", b"\0\0\0\0"), (VALUES, b"\0\0\xc0\x7f")])
def test_what_is_no_scale_is_found_without_the_source(name: str, bits: bytes, folder: Path, tmp_path: Path) -> None:
    """Programs divide by it: 0 and NaN, though the manifest says that it was always so."""
    out = copy(folder / "out", tmp_path / "out")
    poke(out, name, bits)
    assert refused(sealed(out)) == [f"{name}: holds what is no scale: not a finite number above 0"]


# --- bad input -------------------------------------------------------------------------------------------------------


def without(out: Path, name: str, change: Any = None) -> Path:
    """A result whose file lacks a tensor, or has another one."""
    from safetensors.torch import load_file, save_file

    file = out / "model.safetensors"
    table = load_file(file)
    table.pop(name)
    save_file(table | ({name: change} if change is not None else {}), file, metadata={"format": "np"})
    return sealed(out)


@pytest.mark.parametrize("name", [f"{DOWN}.activation_scale", KEYS])
def test_a_missing_scale_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    lines = refused(without(copy(folder / "out", tmp_path / "out"), name))
    assert [line for line in lines if line.startswith(f"{name}: is not there, config.json (")], lines


def test_a_cache_of_another_width_is_named(folder: Path, tmp_path: Path) -> None:
    lines = refused(without(copy(folder / "out", tmp_path / "out"), KEYS, torch.ones(64)))
    assert [line for line in lines if line.startswith(f"{KEYS}: is F32 (64,), config.json (") and "wants F32 (128,)" in line], (
        lines
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_permuted": True}, "quantization_config has is_permuted True; of mix_quant this tool reads False"),
        ({"kv_cache_quant_type": None}, "quantization_config has kv_cache_quant_type None; of mix_quant this tool reads 'int8'"),
        ({"hadamard_block_size": 64}, "hadamard_block_size is 64, not 128, 256, 512, 1024"),
    ],
    ids=str,
)
def test_a_config_of_another_kind_is_refused(
    change: dict[str, Any], said: str, folder: Path, command: Command, tmp_path: Path
) -> None:
    out = copy(folder / "out", tmp_path / "out")
    edit(out, "config.json", lambda found: found["quantization_config"].update(change))
    code, _, err = command("dequantize", out, tmp_path / "plain", "--to", "pt")
    assert (code, err.splitlines()[0]) == (1, f"error: config.json: {said}")


def test_another_block_in_config_json_is_seen_in_the_weights(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "out", tmp_path / "out")
    edit(out, "config.json", lambda found: found["quantization_config"].update(hadamard_block_size=256))
    assert any(line.startswith(f"{DOWN}.weight: its relative error is ") for line in refused(out, folder / "src"))


def test_without_a_text_it_is_refused(folder: Path, command: Command, tmp_path: Path) -> None:
    code, _, err = command("w4a8", folder / "src", tmp_path / "out")
    assert (code, err.splitlines()[-1].split(": ", 1)[1][:41]) == (2, "w4a8 wants --calibration auto or --calibr")
    with pytest.raises(PlanError) as error:
        make_plan(open_source(folder / "src"), runtime="fastdeploy", recipe=_recipe(128))
    assert error.value.problems == [
        "w4a8 wants --calibration: rtn_kv and w4a8 have scales of activations, which are measured on text"
    ]


def test_a_block_that_does_not_divide_is_named(command: Command, tmp_path: Path) -> None:
    source = w4a8.model(tmp_path / "src", moe_intermediate_size=384)
    options = ("--calibration", "auto", "--hadamard-block-size", 256)
    code, _, err = command("w4a8", source, tmp_path / "out", *options)
    assert (code, err.splitlines()[1]) == (
        1, "  ernie.layers.*.mlp.experts.*.down_proj.weight: w4a8: hadamard_block_size 256 does not divide 384 inputs;"
        " 128, 64 would (4 tensors)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "said"), [("dense", "this model has no experts; w4a8 is for those that have"), ("vl", "W4A8 of text")]
)
def test_a_model_without_text_experts_is_refused(family: str, said: str, command: Command, tmp_path: Path) -> None:
    changes = {"moe_intermediate_size": [256, 128], "hidden_size": 256, "intermediate_size": 128} if family == "vl" else {}
    source = byte_tokenizer(random_model(tmp_path / "src", "paddle", family, vocab_size=256, **changes))
    for more in ((), ("--unsupported",)):
        code, _, err = command("w4a8", source, tmp_path / "out", "--calibration", "auto", *more)
        assert code == 1
        assert said in err, err


def test_rules_of_one_s_own_must_make_the_whole_container() -> None:
    spec = TensorSpec((256, 512), "BF16")
    linears = [
        fastdeploy.Linear(f"{DOWN}.weight", spec, "experts", Weight4Activation8(), 1),
        fastdeploy.Linear(f"{UP}.weight", spec, "experts", fastdeploy.WINT4, 0),
        fastdeploy.Linear(f"{QKV}.weight", spec, "attention", fastdeploy.WINT8, 0),
        fastdeploy.Linear("ernie.layers.1.self_attn.o_proj.weight", spec, "attention", CachedRoundToNearest(32), 1),
    ]
    wants = [line.split(": FastDeploy's container wants ")[1] for line in fastdeploy.problems(linears)]
    assert [line[:44] for line in wants] == [
        "w4a8 with hadamard_block_size 128, 256, 512,",
        "w4a8, not int4 (-7 to 7), per channel, mse",
        "WINT8 with the scales of a cache (rtn_kv), n",
        "int8 (-127 to 127), per channel, mse, not in",
    ]


def test_the_cache_has_the_channels_of_the_model() -> None:
    """384 queries, keys and values of 128; o_proj has as many inputs as there are queries."""
    attention, qkv, o = QKV.removesuffix("qkv_proj"), TensorSpec((640, 256), "BF16"), TensorSpec((256, 384), "BF16")
    linears = [
        fastdeploy.Linear(f"{attention}qkv_proj.weight", qkv, "attention", CachedRoundToNearest(64), 0),
        fastdeploy.Linear(f"{attention}o_proj.weight", o, "attention", fastdeploy.WINT8, 1),
    ]
    assert fastdeploy.problems(linears) == [f"{QKV}.weight: cached_channels is 64, and the model has 128"]


def _recipe(block: int) -> Any:
    return built_in.make("w4a8", hadamard_block_size=block).recipe


def _calibration() -> Any:
    from ernie_quant.planning.calibration import Calibration

    return Calibration("auto", {"x": "0" * 64})


def test_a_nightly_job_wants_a_text(tmp_path: Path) -> None:
    job = job_file(tmp_path, '[[target]]\nrepo = "me/tiny"\nrecipe = "w4a8"\nhadamard_block_size = 128\n', source=tmp_path)
    with pytest.raises(PlanError) as error:
        read_job(job)
    assert error.value.problems == ["[[target]] 1: recipe w4a8 is made of what a text shows: it wants a [target.calibration]"]
    job.write_text(job.read_text() + '[target.calibration]\ntext = "auto"\n')
    (target,) = read_job(job).targets
    assert (target.runtime, target.recipe.name) == ("fastdeploy", "w4a8")


def test_the_library_makes_the_same(folder: Path, tmp_path: Path) -> None:
    how = {"calibration": folder / "book.txt", "calibration_tokens": 512, "method": "nearest"}
    ernie_quant.quantize(folder / "src", tmp_path / "out", "w4a8", **how)
    assert lasting(tmp_path / "out") == lasting(folder / "out")


def test_ranks_are_dequantized_to_what_the_specification_decodes(folder: Path, tmp_path: Path, stored: Arrays) -> None:
    invoke("dequantize", folder / "tp4", tmp_path / "plain", "--to", "paddle")
    found = read_folder(tmp_path / "plain")
    for layer in (UP, DOWN, QKV):
        assert np.array_equal(w4a8.plain(found[f"{layer}.weight"]), w4a8.decode(layer, stored))
