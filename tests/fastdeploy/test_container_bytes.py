"""FastDeploy's container: every stored byte against a decoder written from the specification, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.containers import (
    END,
    EXPERT,
    PARTS,
    Arrays,
    bits_of,
    decode,
    decode_all,
    every_case,
    read_file,
    read_folder,
    report,
    source_of,
    widened,
)
from helpers.disk import contents
from helpers.models import config, write
from helpers.runs import Killed, stop_in_second_shard

from ernie_quant.check.verify import verify
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import fastdeploy
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files
from ernie_quant.weights.stored import open_stored

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- every byte ------------------------------------------------------------------------------------------------------


@every_case
def test_paddle_and_pt_sources_give_the_same_bytes(case: str, folder: Path) -> None:
    one, two = folder / f"{case}-src", folder / f"{case}-pt"
    files = [p.relative_to(one) for p in sorted(one.rglob("*.safetensors"))]
    assert [str(f) for f in files] == ["model.safetensors", "mtp/model.safetensors"]
    assert [(one / f).read_bytes() == (two / f).read_bytes() for f in files] == [True, True]
    assert config(one)["quantization_config"] == config(two)["quantization_config"]


def test_wint4_is_wint2_with_every_layer_in_4_bits(folder: Path, tmp_path: Path) -> None:
    """So the command `wint2` refuses that, and leads to wint4."""
    write(folder / "src", tmp_path / "out", "fastdeploy", recipe=built_in.fastdeploy_container("wint2", 3))
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


@pytest.mark.parametrize("source", ["src", pytest.param("pt", marks=pytest.mark.slow)])  # as of tests/views: many tiny slabs
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
