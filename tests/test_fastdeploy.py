"""FastDeploy's container: every stored byte against a decoder written from the specification, and what config.json says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import copy, invoke, random_model, write
from test_run import Killed, contents, stop_in_second_shard
from test_verify import edit, poke, refused, sealed

from ernie_quant import runtimes
from ernie_quant.check.verify import verify
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.plan import built_in
from ernie_quant.plan.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import fastdeploy
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files
from ernie_quant.weights import layouts
from ernie_quant.weights.stored import open_stored

MAKE_GEOMETRY = Path(__file__).parents[1] / "benchmarks/make_geometry.py"
Command = Callable[..., tuple[int, str, str]]
F = np.float32

# H 256, Q 384, KV 128, I 320, M 128 or shared 256: a dense layer, two with 3 experts, an MTP block; no linear is square
WIDTHS: dict[str, Any] = {
    "hidden_size": 256, "head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 320,
    "moe_intermediate_size": 128, "moe_num_experts": 3, "moe_k": 2,
}  # fmt: skip
LAST = 2  # layer
EXPERT = "ernie.layers.2.mlp.experts.1.up_gate_proj"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# --- the decoder: numpy and the specification, nothing of the package ------------------------------------------------

ITEMS = {"U8": "<u1", "I8": "<i1", "BF16": "<u2", "F32": "<f4"}
Arrays = dict[str, np.ndarray]  # bf16 as u2


def read_file(path: Path) -> Arrays:
    """A safetensors file: 8 bytes of length, a JSON header, the tensors."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        item = ITEMS["BF16" if entry["dtype"] == "U16" else entry["dtype"]]
        found[name] = np.frombuffer(data[start + first : start + last], item).reshape(entry["shape"]).copy()
    return found


def read_folder(folder: Path) -> Arrays:
    """The root and the MTP block's own folder."""
    return {name: array for path in sorted(folder.rglob("*.safetensors")) for name, array in read_file(path).items()}


def widened(bits: np.ndarray) -> np.ndarray:
    """f32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(F)


def bf16(x: np.ndarray) -> np.ndarray:
    """f32 rounded to what bf16 can hold, half to even."""
    bits = x.astype(F).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(F)


def decode_wint2(parts: Arrays) -> np.ndarray:
    """[K, N] of the five tensors."""
    q, pairs = parts["quant_weight"].astype(np.float64), parts["weight_scale"]
    fused = (q * parts["code_scale"].astype(np.float64) + parts["code_zp"]).astype(F)  # rounded once
    code = np.floor(fused + F(0.5)).astype(np.int64) & 0x7FFF
    values = np.stack([(code >> shift & 63) - 32 for shift in (9, 6, 3, 0)], 1).reshape(-1, q.shape[1])
    local = np.stack([pairs >> 4, pairs & 15], 1).reshape(-1, q.shape[1])  # groups 2i, 2i + 1
    scale = bf16(local.astype(F) * widened(parts["super_scales"]))
    stored = bf16(values.astype(F) * scale.repeat(64, 0))
    weight = np.empty_like(stored)
    for group in range(0, len(stored), 64):
        for a in range(4):
            for b in range(8):
                for c in range(2):
                    weight[group + 8 * b + 2 * a + c] = stored[group + 16 * a + 2 * b + c]
    return weight


def decode_weight_only(parts: Arrays, bits: int) -> np.ndarray:
    """[K, N] of WINT4 or WINT8: the four passes, last one first."""
    packed = parts["quant_weight"]
    rows, k = packed.shape[0] * 8 // bits, packed.shape[1]
    raw = packed.view(np.uint8).reshape(-1)
    if bits == 8:  # (4) bytes 1 and 2 of every 4 are swapped, 128 is added
        u = raw.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1).astype(int) - 128
    else:  # (4) nibble p of a word of 8 holds element order[p], the low nibble first; 8 is added
        nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(-1, 8)
        u = np.empty(nibbles.shape, int)
        for p, element in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            u[:, element] = nibbles[:, p].astype(int) - 8
        u = u.reshape(-1)
    together = 16 // bits  # (3) columns take turns in tiles of 64
    columns = u.reshape(rows // together, k // 64, together, 64).transpose(0, 2, 1, 3).reshape(rows, k)
    permuted = columns.T  # (2)
    block, e = (16, 4) if bits == 8 else (32, 8)  # (1)
    code = np.empty_like(permuted)
    for first in range(0, k, block):
        for t in range(block):
            code[first + 8 * ((t % e) // 2) + t % 2 + 2 * (t // e)] = permuted[first + t]
    return bf16(code.astype(F) * widened(parts["weight_scale"]))


PARTS = {
    2: {"quant_weight": "u1", "weight_scale": "u1", "super_scales": "u2", "code_scale": "f4", "code_zp": "f4"},
    4: {"quant_weight": "i1", "weight_scale": "u2"},
    8: {"quant_weight": "i1", "weight_scale": "u2"},
}


def bits_of(layer: str, last_wint4: int) -> int:
    """As FastDeploy decides: experts by their layer, every other linear WINT8."""
    found = re.search(r"layers\.(\d+)\.mlp\.experts\.", layer)
    return 8 if not found else 4 if int(found[1]) <= last_wint4 else 2


def decode(layer: str, stored: Arrays, bits: int) -> np.ndarray:
    parts = {part: stored[f"{layer}.{part}"] for part in PARTS[bits]}
    assert {part: array.dtype.str[1:] for part, array in parts.items()} == PARTS[bits]
    return decode_wint2(parts) if bits == 2 else decode_weight_only(parts, bits)


def decode_all(stored: Arrays, last_wint4: int) -> tuple[Arrays, Arrays]:
    """(decoded weights, kept tensors): every stored tensor is in one of them, and in no other."""
    layers = {name.rpartition(".")[0] for name in stored if name.endswith(".quant_weight")}
    decoded = {f"{layer}.weight": decode(layer, stored, bits_of(layer, last_wint4)) for layer in sorted(layers)}
    used = {f"{layer}.{part}" for layer in layers for part in PARTS[bits_of(layer, last_wint4)]}
    return decoded, {name: array for name, array in stored.items() if name not in used}


# --- checkpoints -----------------------------------------------------------------------------------------------------


LAYERS = {"none": ("wint2", "--wint4-layers", 0), "one": ("wint2", "--wint4-layers", 2),
          "all": ("wint4", "--runtime", "fastdeploy"), "shared": ("wint2", "--wint4-layers", 2)}  # fmt: skip
END = {"none": -1, "one": 1, "all": LAST, "shared": 1}  # the last layer whose experts are WINT4
every_case = pytest.mark.parametrize("case", LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src (and pt, the same in PT layout), src-shared; a container for each case, and those of src from PT."""
    folder = tmp_path_factory.mktemp("fastdeploy")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        random_model(folder / "src", layouts.PADDLE, "moe_mtp", **WIDTHS)
        random_model(folder / "src-shared", layouts.PADDLE, "moe_mtp", **WIDTHS, moe_num_shared_experts=2)
        for source, pt in (("src", "pt"), ("src-shared", "pt-shared")):
            write(folder / source, folder / pt)
        for case, (name, *options) in LAYERS.items():
            for source in ("src", "pt"):
                suffix = "-shared" if case == "shared" else ""
                text = invoke(name, folder / f"{source}{suffix}", folder / f"{case}-{source}", *options)
                (folder / f"{case}-{source}.txt").write_text(text)
    return folder


def source_of(folder: Path, case: str) -> Path:
    return folder / ("src-shared" if case == "shared" else "src")


def report(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "report.json").read_text())["tensors"]}


def config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


# --- every byte ------------------------------------------------------------------------------------------------------


@every_case
def test_paddle_and_pt_sources_give_the_same_bytes(case: str, folder: Path) -> None:
    one, two = folder / f"{case}-src", folder / f"{case}-pt"
    files = [p.relative_to(one) for p in sorted(one.rglob("*.safetensors"))]
    assert [str(f) for f in files] == ["model.safetensors", "mtp/model.safetensors"]
    assert [(one / f).read_bytes() == (two / f).read_bytes() for f in files] == [True, True]
    assert config(one)["quantization_config"] == config(two)["quantization_config"]


def test_wint4_is_wint2_with_every_layer_in_4_bits(folder: Path, tmp_path: Path) -> None:
    invoke("wint2", folder / "src", tmp_path / "out", "--wint4-layers", 3)
    for file in ("model.safetensors", "mtp/model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / "all-src" / file).read_bytes()


@every_case
def test_every_stored_tensor_is_that_of_the_specification(case: str, folder: Path) -> None:
    """Names and shapes of the whole container, from the source's alone; what is no linear has the source's bytes."""
    stored, source = read_folder(folder / f"{case}-src"), read_file(source_of(folder, case) / "model.safetensors")
    _, kept = decode_all(stored, END[case])
    expected: dict[str, tuple[int, ...]] = {}
    for name, array in source.items():
        if not name.endswith(("qkv_proj.weight", "o_proj.weight", "up_gate_proj.weight", "down_proj.weight")):
            assert kept.pop(name).tobytes() == array.tobytes(), name
            continue
        layer, (k, n) = name.removesuffix(".weight"), array.shape
        if (bits := bits_of(layer, END[case])) == 2:
            expected |= {f"{layer}.quant_weight": (k // 4, n), f"{layer}.weight_scale": (k // 128, n)}
            expected |= {f"{layer}.{part}": (n,) for part in ("super_scales", "code_scale", "code_zp")}
        else:
            expected |= {f"{layer}.quant_weight": (n * bits // 8, k), f"{layer}.weight_scale": (n,)}
    assert kept == {}
    assert {name: stored[name].shape for name in stored if name not in source} == expected


@every_case
def test_what_the_kernel_computes_is_what_is_reported_and_read_back(case: str, folder: Path) -> None:
    out, source = folder / f"{case}-src", read_file(source_of(folder, case) / "model.safetensors")
    decoded, _ = decode_all(read_folder(out), END[case])
    rows = {name: row for name, row in report(out).items() if row["codec"] != "kept"}
    assert decoded.keys() == rows.keys()
    for name, weight in decoded.items():
        original = widened(source[name]).astype(np.float64)
        error, norm = ((weight - original) ** 2).sum(), (original**2).sum()
        assert rows[name]["rel_error"] == pytest.approx(error / norm, rel=1e-9), name
        assert rows[name]["max_abs_error"] == np.abs(weight - original).max(), name
        assert error / norm < {2: 0.12, 4: 0.015, 8: 1e-4}[bits_of(name, END[case])], name
    entries, problems = open_stored(open_source(out), fastdeploy)
    assert problems == []
    with Files() as files:
        for entry in entries:
            if entry.name in decoded:
                found = entry.read(files, (0, entry.shape[0]))  # [out, in]
                assert found.dtype == torch.bfloat16
                assert (found.float().numpy().view(np.uint32) == decoded[entry.name].T.view(np.uint32)).all(), entry.name


def flipped(stored: Arrays, name: str, at: int) -> Arrays:
    """All bits of one byte."""
    changed = stored[name].copy()
    changed.reshape(-1).view(np.uint8)[at] ^= 0xFF
    return stored | {name: changed}


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        (EXPERT, 2),
        ("ernie.layers.1.mlp.experts.2.down_proj", 4),
        ("ernie.layers.0.mlp.up_gate_proj", 8),
        ("ernie.layers.2.self_attn.qkv_proj", 8),
        ("ernie.mtp_block.0.self_attn.o_proj", 8),
    ],
)
def test_no_byte_is_without_effect(layer: str, bits: int, folder: Path) -> None:
    stored = read_folder(folder / "one-src")
    stored = {name: array for name, array in stored.items() if name.startswith(f"{layer}.")}
    assert len(stored) == len(PARTS[bits])
    before = decode(layer, stored, bits)
    random = np.random.default_rng(0)
    with np.errstate(all="ignore"):  # a scale may become NaN
        for name, array in stored.items():
            for at in random.choice(array.nbytes, 16, replace=False):
                after = decode(layer, flipped(stored, name, at), bits)
                assert (after.view(np.uint32) != before.view(np.uint32)).any(), (name, at)


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


PUBLISHED = json.loads("""{
  "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
  "moe_quant_config": {
    "quant_type": "w4w2",
    "moe_w4_quant_config": {"quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 6},
    "moe_w2_quant_config": {"quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64, "quant_start_layer": 7, "quant_end_layer": 53}}}
""")  # noqa: E501


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


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(command: Command, *arguments: object) -> list[str]:
    """Exit code 1, nothing on stdout, OUT (the third argument) not begun; the lines on stderr."""
    code, out, err = command(*arguments)
    assert (code, out) == (1, ""), (out, err)
    assert not Path(str(arguments[2])).exists()
    assert err.startswith("error: ")
    return err.splitlines()


@pytest.mark.parametrize("arguments", [("wint2",), ("wint2", "--wint4-layers", 0), ("wint4", "--runtime", "fastdeploy")], ids=str)
def test_a_dense_model_is_refused(arguments: tuple[object, ...], command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, "dense", **{k: v for k, v in WIDTHS.items() if "moe" not in k})
    lines = refusal(command, arguments[0], source, tmp_path / "out", *arguments[1:])
    assert lines[1:] == ["  this model has no experts; FastDeploy's container is for those that have"]


VL = {k: v for k, v in WIDTHS.items() if "moe" not in k} | {"moe_intermediate_size": [256, 128]}


@pytest.mark.parametrize("arguments", [("wint2",), ("wint4", "--runtime", "fastdeploy")], ids=str)
def test_a_vl_model_is_refused_and_written_only_with_unsupported(
    arguments: tuple[object, ...], command: Command, tmp_path: Path
) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, "vl", **VL)
    lines = refusal(command, arguments[0], source, tmp_path / "out", *arguments[1:])
    assert len(lines) == 2
    assert "has no loader for a WINT2 or WINT4 VL checkpoint: wint4 --runtime vllm and fp8 make ones that load" in lines[1]
    layers = () if arguments[0] == "wint4" else ("--wint4-layers", 0)
    code, out, _ = command(arguments[0], source, tmp_path / "out", *arguments[1:], *layers, "--unsupported")
    assert code == 0
    assert "note: FastDeploy has no loader for a WINT2 or WINT4 VL checkpoint" in out
    last = 1 if arguments[0] == "wint4" else -1
    decoded, kept = decode_all(read_folder(tmp_path / "out"), last)
    # 4 text and 4 vision experts, the shared ones, a dense FFN, two layers of attention
    assert len([name for name in decoded if ".experts." in name]) == 8 * 2
    assert len(decoded) == 8 * 2 + 2 + 2 + 2 * 2
    assert {"ernie.layers.1.mlp.gate.weight", "ernie.layers.1.mlp.gate.weight_1", "vision_model.ln.weight"} <= kept.keys()
    rows = report(tmp_path / "out")
    original = read_file(source / "model.safetensors")
    for name, weight in decoded.items():
        plain = widened(original[name]).astype(np.float64)
        assert rows[name]["rel_error"] == pytest.approx(((weight - plain) ** 2).sum() / (plain**2).sum(), rel=1e-9)
    assert verify(tmp_path / "out", source).quantized == len(decoded)


@pytest.mark.parametrize("name", ["wint2", "wint4"])
def test_experts_only_is_refused(name: str, folder: Path, command: Command, tmp_path: Path) -> None:
    options = ("--runtime", "fastdeploy") if name == "wint4" else ()
    lines = refusal(command, name, folder / "src", tmp_path / "out", "--experts-only", *options)
    assert lines == ["error: --experts-only: FastDeploy's container needs its other linears as WINT8; leave it out"]


def test_widths_that_do_not_fit_are_all_listed_before_anything_is_written(command: Command, tmp_path: Path) -> None:
    source = random_model(
        tmp_path / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | {"hidden_size": 192, "moe_intermediate_size": 68}
    )
    lines = refusal(command, "wint2", source, tmp_path / "out", "--wint4-layers", 0)
    assert lines[1:] == [
        "  ernie.layers.*.mlp.experts.*.down_proj.weight: wint2: 68 inputs are not a multiple of 128, 128 would be (6 tensors)",
        "  ernie.layers.*.mlp.experts.*.up_gate_proj.weight: wint2: 192 inputs are not a multiple of 128, 128 or 256 would be (6 tensors)",  # noqa: E501
    ]
    lines = refusal(command, "wint4", source, tmp_path / "out", "--runtime", "fastdeploy")
    assert lines[1:] == [
        "  ernie.layers.*.mlp.experts.*.down_proj.weight: 192 outputs and 68 inputs are not multiples of 8 and 64, which its kernels want (6 tensors)",  # noqa: E501
    ]


def test_what_is_quantized_already_is_refused(folder: Path, command: Command, tmp_path: Path) -> None:
    invoke("wint8", folder / "src", tmp_path / "int8", "--experts-only")
    for source in (folder / "one-src", tmp_path / "int8"):
        (line,) = refusal(command, "wint2", source, tmp_path / "out")
        assert "is quantized already (config.json has quantization_config); start from the original checkpoint" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("wint4", "--runtime", "fastdeploy", "--group-size", "64"), "--group-size does not go with --runtime fastdeploy"),
        (("wint4", "--runtime", "fastdeploy", "--mtp"), "--mtp does not go with --runtime fastdeploy"),
        (("wint4", "--runtime", "fastdeploy", "--keep-unfit"), "--keep-unfit does not go with --runtime fastdeploy"),
        (("wint4", "--unsupported"), "--unsupported does not go with --runtime vllm"),
        (("wint4", "--runtime", "transformers", "--unsupported"), "--unsupported does not go with --runtime transformers"),
        (("wint2", "--runtime", "vllm"), "'vllm' is not 'fastdeploy'"),
        (("wint2", "--wint4-layers", "-1"), "-1 is not in the range"),
        (("wint2", "--effort", "2"), "'2' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_two_for_usage(arguments: tuple[str, ...], words: str, folder: Path, command: Command, tmp_path: Path) -> None:
    code, out, err = command(arguments[0], folder / "src", tmp_path / "out", *arguments[1:])
    assert (code, out) == (2, "")
    assert words in err


def test_the_run_command_says_machete_is_off(folder: Path) -> None:
    for case in LAYERS:
        plain, draft = (folder / f"{case}-src.txt").read_text().splitlines()[-2:]
        assert plain.startswith("  FastDeploy: FD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model ")
        assert draft.startswith(
            "  FastDeploy with MTP: FD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model "
        )
        assert draft.endswith(f'"model": "{folder}/{case}-src/mtp"}}\'')
        card = (folder / f"{case}-src/README.md").read_text()
        assert f"\nFD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model {case}-src " in card
        assert "FD_USE_MACHETE=0 is needed" in card
    assert "FD_USE_MACHETE" not in "".join(c for _, c in runtimes.find("fastdeploy").commands(Path("out"), {}, (1,)))


# --- the same bytes, whatever happens --------------------------------------------------------------------------------


def planned(source: Path, layers: int | None, shard_bytes: int = 10**9) -> Any:
    return make_plan(
        open_source(source), runtime="fastdeploy", recipe=built_in.fastdeploy_container("wint2", layers), shard_bytes=shard_bytes
    )


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    plan, out = planned(folder / "src", 2, 500_000), tmp_path / "a/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    assert {p.name for p in out.iterdir()} == {plan.shards[0].filename, ".ernie-quant"}
    assert len(run_plan(plan, out).reports) == len(plan.steps)
    run_plan(plan, tmp_path / "b/out")
    assert contents(out) == contents(tmp_path / "b/out")
    split, whole = read_folder(out), read_folder(folder / "one-src")
    assert {name: array.tobytes() for name, array in split.items()} == {name: array.tobytes() for name, array in whole.items()}
    for place in (out, out / "mtp"):
        files = {p.name for p in place.glob("*.safetensors")}
        assert set(json.loads((place / "model.safetensors.index.json").read_text())["weight_map"].values()) == files


@pytest.mark.parametrize("source", ["src", "pt"])
def test_slabs_leave_no_trace(source: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four columns of WINT2, four rows of WINT4 and WINT8 (of which two or four are mixed) at a time."""
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 1)
    plan = planned(folder / source, 2)
    spans = {step.slabs()[1] for step in plan.steps if step.quantized}
    assert spans == {(4, 8)}
    run_plan(plan, tmp_path / "out")
    for file in ("model.safetensors", "mtp/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / "one-src" / file).read_bytes()
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 10_000)
    assert verify(tmp_path / "out", folder / source).against  # and they are read back so


# --- sizes -----------------------------------------------------------------------------------------------------------

GIB = 2**30


def geometry(model: str, out: Path) -> Path:
    """Sparse files with the true geometry."""
    subprocess.run([sys.executable, MAKE_GEOMETRY, model, out], check=True, capture_output=True)
    return out


def dry_run(command: Command, *arguments: object) -> tuple[float, float]:
    """GiB of tensors without and with the MTP block."""
    code, out, err = command(*arguments, "--dry-run", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["notes"]
    mtp = sum(group["bytes_out"] for group in found["groups"] if group["role"] == "mtp")
    return (found["bytes_out"] - mtp) / GIB, found["bytes_out"] / GIB


def test_sizes_of_the_300b(command: Command, tmp_path: Path) -> None:
    """Published: 87.4 GiB; the arithmetic of the specification for the others."""
    source = geometry("300b", tmp_path / "src")
    assert dry_run(command, "wint2", source, tmp_path / "out") == pytest.approx((87.4, 88.3), rel=0.005)
    assert dry_run(command, "wint4", source, tmp_path / "out", "--runtime", "fastdeploy")[0] == pytest.approx(146.8, rel=0.005)


def test_dry_run_of_the_424b(command: Command, tmp_path: Path) -> None:
    source = geometry("vl-424b", tmp_path / "src")
    without, whole = dry_run(command, "wint2", source, tmp_path / "out", "--unsupported")
    assert without == whole
    # 51 layers, 64 experts of each kind, 3 x 8192 x (3584 + 1536) weights; 47 of the layers in 2.08 bits, 4 in 4 bits
    weights = 64 * 3 * 8192 * (3584 + 1536)
    experts = weights * (47 * 2.08 + 4 * 4) / 8 / GIB
    assert experts < whole < experts + 20
    assert not (tmp_path / "out").exists()


def test_widths_that_do_not_fit_are_listed_at_once_for_all_forms(tmp_path: Path) -> None:
    """96 inputs are no multiple of 128 (WINT2 experts), and no multiple of 64 (the WINT8 dense layer)."""
    random_model(tmp_path / "src", layouts.PADDLE, "moe_mtp", **WIDTHS | {"moe_intermediate_size": 96, "intermediate_size": 96})
    with pytest.raises(PlanError) as refused:
        make_plan(open_source(tmp_path / "src"), runtime="fastdeploy", recipe=built_in.fastdeploy_container("wint2", 0))
    lines = "\n".join(refused.value.problems)
    assert "experts.*.down_proj.weight: wint2: 96 inputs are not a multiple of 128" in lines
    assert "layers.0.mlp.down_proj.weight: " in lines
    assert "256 outputs and 96 inputs are not multiples of 8 and 64" in lines
