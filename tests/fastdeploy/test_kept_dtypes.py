"""FastDeploy's container of a float32 or float16 source: kept beside bf16 scales in bf16, and routers as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.containers import WIDTHS, report
from helpers.models import config, copy, invoke, random_model, tensors
from helpers.results import poke, refused, sealed
from safetensors.torch import save_file

from ernie_quant.check.verify import verify
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

ROUTERS = (".mlp.gate.weight", ".e_score_correction_bias")
BIAS = "ernie.layers.0.self_attn.o_proj.bias"
NORM = "ernie.norm.weight"
TINY = WIDTHS | {
    "num_hidden_layers": 2,
    "moe_layer_end_index": 1,
    "moe_num_experts": 2,
    "moe_intermediate_size": 256,
    "intermediate_size": 256,
}


def in_dtype(folder: Path, bf16: Path, dtype: torch.dtype) -> Path:
    """The model in another dtype, with values that bf16 does not have; routers stay float32."""
    table = {name: t if name.endswith(ROUTERS) else (t.float() * 1.001).to(dtype) for name, t in tensors(bf16).items()}
    folder.mkdir()
    (folder / "config.json").write_text((bf16 / "config.json").read_text())
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bf16, f32 and f16, and their WINT2 containers beside them."""
    folder = tmp_path_factory.mktemp("dtypes")
    random_model(folder / "bf16", layouts.PADDLE, "moe_mtp", **TINY)
    _with_biases(folder / "bf16")
    in_dtype(folder / "f32", folder / "bf16", torch.float32)
    in_dtype(folder / "f16", folder / "bf16", torch.float16)
    for name in ("bf16", "f32", "f16"):
        said = invoke("wint2", folder / name, folder / f"{name}-out", "--wint4-layers", 0, "--effort", 1)
        (folder / f"{name}.txt").write_text(said)
    return lambda name: folder / name


def _with_biases(folder: Path) -> None:
    """FastDeploy sets biases without a cast."""
    table = tensors(folder)
    for name in [n for n in table if n.endswith("_proj.weight") and "linear_proj" not in n]:
        table[name.replace(".weight", ".bias")] = torch.randn(table[name].shape[1]).bfloat16()
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(folder) | {"use_bias": True}))


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return tensors(folder) | tensors(folder / "mtp")


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_what_is_kept_is_rounded_to_bf16(name: str, sources: Callable[[str], Path]) -> None:
    source, out = tensors(sources(name)), everything(sources(f"{name}-out"))
    kept = out.keys() & source.keys()
    assert {"ernie.embed_tokens.weight", NORM, BIAS, "ernie.mtp_linear_proj.0.weight"} <= kept
    for weight in kept:
        expected = source[weight] if weight.endswith(ROUTERS) else source[weight].bfloat16()
        assert out[weight].dtype == expected.dtype
        assert torch.equal(out[weight], expected), weight
    assert sum(weight.endswith(ROUTERS) for weight in kept) == 2
    assert config(sources(f"{name}-out"))["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_the_rounding_is_reported(name: str, sources: Callable[[str], Path]) -> None:
    source, rows = tensors(sources(name)), report(sources(f"{name}-out"))
    weight = source[NORM].double()
    error = (weight - source[NORM].bfloat16().double()).square().sum() / weight.square().sum()
    row = rows[NORM]
    assert (row["codec"], row["bits_per_weight"], row["bytes"]) == ("kept, rounded to bfloat16", 16.0, 2 * 256)
    assert row["rel_error"] == pytest.approx(error.item(), rel=1e-9)
    assert 1e-7 < row["rel_error"] < 2**-16  # half a step of 8 bits
    for router in (weight for weight in rows if weight.endswith(ROUTERS)):
        assert (rows[router]["codec"], rows[router]["rel_error"]) == ("kept", 0)
    rounded = sum(row["codec"].startswith("kept, ") for row in rows.values())
    were = {"f32": "float32", "f16": "float16"}[name]
    said = sources(f"{name}.txt").read_text()
    assert f"note: {rounded} tensors that are kept are {were}: rounded to bfloat16, the dtype of the scales beside them\n" in said


def test_a_bf16_source_is_kept_bit_for_bit(sources: Callable[[str], Path]) -> None:
    source, out, rows = tensors(sources("bf16")), everything(sources("bf16-out")), report(sources("bf16-out"))
    kept = out.keys() & source.keys()
    assert len(kept) > 20
    assert all(torch.equal(out[weight].view(torch.uint8), source[weight].view(torch.uint8)) for weight in kept)
    assert {rows[weight]["codec"] for weight in kept} == {"kept"}
    assert "rounded" not in sources("bf16.txt").read_text()
    manifest = json.loads((sources("bf16-out") / "ernie-quant.json").read_text())
    assert "kept" not in manifest["options"]  # its fingerprint is that of earlier versions


def test_a_plain_conversion_rounds_nothing(sources: Callable[[str], Path], tmp_path: Path) -> None:
    invoke("convert", sources("f32"), tmp_path / "out", "--to", "paddle")
    assert {str(t.dtype) for t in tensors(tmp_path / "out").values()} == {"torch.float32"}
    assert config(tmp_path / "out")["dtype"] == "float32"


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_verify_compares_what_is_rounded(name: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    result = verify(sources(f"{name}-out"), sources(name))
    rounded = sum(row["codec"].startswith("kept, ") for row in report(sources(f"{name}-out")).values())
    assert (result.compared.rounded, result.compared.kept) == (rounded, 2)
    assert result.compared.total == result.tensors
    assert f"{rounded} kept, in another dtype: the nearest to those of" in invoke(
        "verify", sources(f"{name}-out"), "--against", sources(name), "--full"
    )
    out = copy(sources(f"{name}-out"), tmp_path / "out")
    first = tensors(out)[NORM].view(torch.uint8)[0]
    poke(out, NORM, bytes([int(first) ^ 1]))  # the next bf16
    assert refused(sealed(out), sources(name)) == [f"{NORM}: should be the source's values in bfloat16, and is not"]


def test_a_wrong_figure_for_a_rounded_tensor_is_named(sources: Callable[[str], Path], tmp_path: Path) -> None:
    out = copy(sources("f32-out"), tmp_path / "out")

    def flatter(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"rel_error": 0.0} if row["name"] == NORM else row

    table = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(table | {"tensors": [flatter(row) for row in table["tensors"]]}))
    (line,) = refused(sealed(out), sources("f32"))
    assert line.startswith(f"{NORM}: its relative error is ")
    assert line.endswith(", the report says 0")


def test_ranks_and_the_way_back_have_the_same_values(sources: Callable[[str], Path], tmp_path: Path) -> None:
    invoke("wint2", sources("f32"), tmp_path / "tp2", "--wint4-layers", 0, "--effort", 1, "--tp", 2)
    invoke("reshard", tmp_path / "tp2", tmp_path / "one", "--tp", 1)
    one, out = everything(tmp_path / "one"), everything(sources("f32-out"))
    assert one.keys() == out.keys()
    assert all(torch.equal(one[weight].view(torch.uint8), out[weight].view(torch.uint8)) for weight in out)
    assert (
        verify(tmp_path / "tp2", sources("f32")).compared.rounded == verify(sources("f32-out"), sources("f32")).compared.rounded
    )
    invoke("dequantize", tmp_path / "one", tmp_path / "plain", "--to", "pt")
    plain = tensors(tmp_path / "plain")
    assert {str(t.dtype) for name, t in plain.items() if not name.endswith(ROUTERS)} == {"torch.bfloat16"}
    assert config(tmp_path / "plain")["torch_dtype"] == "bfloat16"


def test_the_beginning_of_an_unrounded_result_is_not_gone_on_with(sources: Callable[[str], Path]) -> None:
    manifest = json.loads((sources("f32-out") / "ernie-quant.json").read_text())
    assert manifest["options"]["kept"] == "kept, rounded to bfloat16"


def test_nan_in_what_is_rounded_is_refused_by_name(sources: Callable[[str], Path], tmp_path: Path) -> None:
    from ernie_quant.errors import CheckpointError

    source = in_dtype(tmp_path / "src", sources("bf16"), torch.float32)
    table = tensors(source)
    table[NORM][3] = float("nan")
    save_file(table, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{NORM}: holds NaN or infinity, which cannot be"):
        invoke("wint2", source, tmp_path / "out", "--wint4-layers", 0, "--effort", 1)
