"""FastDeploy's container: what config.json says, where the MTP block lies, and what verify finds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.containers import END, EXPERT, LAST, PARTS, PUBLISHED, WIDTHS, every_case, read_file, read_folder, source_of
from helpers.models import config, copy, invoke, random_model
from helpers.results import edit, poke, refused, sealed

from ernie_quant.check.verify import verify
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import ConfigError
from ernie_quant.runtimes import fastdeploy
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- config.json and the MTP block -----------------------------------------------------------------------------------


@every_case
def test_config_json_says_what_the_loader_reads(case: str, folder: Path) -> None:
    found = config(folder / f"{case}-src")
    assert found["is_quantized"] is True
    assert (found["dtype"], "torch_dtype" in found) == ("bfloat16", False)
    assert found["architectures"] == ["Ernie4_5_MoeForCausalLM"]
    entry = found["quantization_config"]
    moe = entry["moe_quant_config"]
    assert set(entry) == {"quantization", "dense_quant_type", "dense_quant_config", "moe_quant_type", "moe_quant_config"}
    assert set(moe) == {"quant_type", "moe_w4_quant_config", "moe_w2_quant_config"}
    read = (entry["quantization"], entry["dense_quant_type"], entry["dense_quant_config"]["quant_type"], entry["moe_quant_type"])
    assert read == ("wint2", "wint8", "wint8", "w4w2")
    assert moe["quant_type"] == "w4w2"
    assert moe["moe_w4_quant_config"] == {
        "quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": END[case],
    }  # fmt: skip
    assert moe["moe_w2_quant_config"] == {
        "quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64,
        "quant_start_layer": END[case] + 1, "quant_end_layer": LAST,
    }  # fmt: skip
    added = {"quantization_config", "is_quantized"}
    assert {k: v for k, v in found.items() if k not in added} == config(source_of(folder, case))


def test_the_mtp_block_lies_in_its_own_folder(folder: Path) -> None:
    out = folder / "one-src"
    root, mtp = read_file(out / "model.safetensors"), read_file(out / "mtp/model.safetensors")
    assert not [name for name in root if "mtp" in name]
    linears = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_gate_proj", "mlp.down_proj")
    quantized = {f"ernie.mtp_block.0.{x}.{part}" for x in linears for part in PARTS[8]}
    norms = {f"ernie.mtp_block.0.{x}_layernorm.weight" for x in ("input", "post_attention")}
    norms |= {f"ernie.mtp_{x}_norm.0.weight" for x in ("emb", "hidden")}
    assert mtp.keys() == quantized | norms | {"ernie.mtp_linear_proj.0.weight"}
    assert {mtp[name].dtype.str for name in mtp.keys() - quantized} == {"<u2"}
    assert (out / "mtp/config.json").read_bytes() == (out / "config.json").read_bytes()
    assert config(out)["num_nextn_predict_layers"] == 1


def test_a_model_without_mtp_has_no_such_folder(tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PT, "moe", **WIDTHS, num_hidden_layers=2, moe_layer_end_index=1)
    invoke("wint2", source, tmp_path / "out", "--wint4-layers", 0)
    assert not (tmp_path / "out/mtp").exists()
    assert verify(tmp_path / "out", source).against


def test_a_published_config_is_understood() -> None:
    linears = [f"ernie.layers.{i}.mlp.experts.0.down_proj.weight" for i in (6, 7)]
    linears += ["ernie.layers.7.mlp.shared_experts.down_proj.weight", "ernie.mtp_block.0.mlp.down_proj.weight"]
    linears += ["ernie.layers.7.mlp.gate.weight", "ernie.mtp_linear_proj.0.weight"]
    spec = TensorSpec((128, 128), "BF16")
    found = list(fastdeploy.codecs_of(PUBLISHED, [(name, spec) for name in linears]).values())
    assert found == [fastdeploy.WINT4, fastdeploy.WINT2, fastdeploy.WINT8, fastdeploy.WINT8, KEEP, KEEP]


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": "wint4"},
        {"moe_quant_config": None},
        {"moe_quant_config": {"quant_type": "w4a8"}},
        {"moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": "6"}}},
    ],
    ids=str,
)
def test_a_config_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="none that this tool writes"):
        fastdeploy.codecs_of(PUBLISHED | change, [])


# --- verify ----------------------------------------------------------------------------------------------------------


@every_case
def test_a_container_is_verified(case: str, folder: Path) -> None:
    # a linear is q|k|v, o, gate|up or down: 3 layers and the MTP block of attention, 2 dense FFNs, 2 x 3 experts
    linears = 4 * 2 + 2 * 2 + 2 * 3 * 2 + (2 * 2 if case == "shared" else 0)
    for source in (None, source_of(folder, case), folder / ("pt-shared" if case == "shared" else "pt")):
        assert verify(folder / f"{case}-{'pt' if source and 'pt' in source.name else 'src'}", source).quantized == linears


def test_a_changed_code_is_named(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "one-src", tmp_path / "out")
    code = read_folder(out)[f"{EXPERT}.quant_weight"][0, 0]
    poke(out, f"{EXPERT}.quant_weight", bytes([code ^ 1]))
    assert refused(out)[0].startswith("model.safetensors: its sha256 is ")
    verify(sealed(out))  # nothing but the source can tell
    (line,) = refused(out, folder / "src")
    assert line.startswith(f"{EXPERT}.weight: its relative error is ")


def test_swapped_nibbles_of_local_scales_are_named(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "one-src", tmp_path / "out")
    pairs = read_folder(out)[f"{EXPERT}.weight_scale"]
    at = int(np.flatnonzero(pairs.reshape(-1) >> 4 != pairs.reshape(-1) & 15)[0])
    row = pairs.reshape(-1)[: at + 1].copy()
    row[at] = row[at] >> 4 | (row[at] & 15) << 4
    poke(out, f"{EXPERT}.weight_scale", row.tobytes())
    (line,) = refused(sealed(out), folder / "src")
    assert line.startswith(f"{EXPERT}.weight: its relative error is ")


def test_a_super_scale_that_is_no_number_is_found_without_the_source(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "one-src", tmp_path / "out")
    poke(out, f"{EXPERT}.super_scales", b"\xc0\x7f")
    assert refused(sealed(out)) == [f"{EXPERT}.weight: rows 0 to 256 decode to NaN or infinity"]


def wint4_entry(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]


@pytest.mark.parametrize(("end", "layer"), [(2, 2), (0, 1)])
def test_an_edited_quant_end_layer_is_named(end: int, layer: int, folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "one-src", tmp_path / "out")
    edit(out, "config.json", lambda c: wint4_entry(c).update(quant_end_layer=end))
    lines = refused(out)
    for expert in range(3):
        for linear in ("up_gate_proj", "down_proj"):
            name = f"ernie.layers.{layer}.mlp.experts.{expert}.{linear}.quant_weight: is "
            assert [line for line in lines if line.startswith(name)], (name, lines)


def test_the_mtp_folder_is_verified_too(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "one-src", tmp_path / "out")
    with open(out / "mtp/model.safetensors", "r+b") as damaged:
        damaged.seek(-1, os.SEEK_END)
        last = damaged.read(1)[0]
        damaged.seek(-1, os.SEEK_END)
        damaged.write(bytes([last ^ 1]))
    file, weight = refused(out)
    assert file.startswith("mtp/model.safetensors: its sha256 is ")
    assert weight.startswith("ernie.mtp_")
    (line,) = refused(sealed(out), folder / "src")
    assert line.startswith("ernie.mtp_")
