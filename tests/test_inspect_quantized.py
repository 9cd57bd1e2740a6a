"""What `inspect` says of quantized checkpoints: form, bits per weight, groups and roles, whoever made them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.disk import no_waiting
from helpers.models import GOLDEN, invoke, random_model
from helpers.synthetic import read_file, wide, write_model, write_safetensors

from ernie_quant.inspection import Inspection, inspect
from ernie_quant.weights import layouts

Command = Callable[..., tuple[int, str, str]]
SIZES = {
    "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512,
    "moe_intermediate_size": 512, "moe_num_experts": 3, "moe_k": 2,
}  # fmt: skip
INT8 = "int8 (-127 to 127), per channel"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of this program in every form."""
    folder = tmp_path_factory.mktemp("forms")
    with no_waiting():
        write_model(folder / "wide", *wide())
        random_model(folder / "paddle", layouts.PADDLE, "moe_mtp", **SIZES)
        invoke("wint4", GOLDEN / "moe/pt", folder / "int4", "--experts-only", "--group-size", "32")
        invoke("wint8", GOLDEN / "moe/pt", folder / "int8", "--group-size", "channel")
        invoke("fp8", folder / "wide", folder / "fp8", "--experts-only")
        invoke("wint2", folder / "paddle", folder / "wint2", "--wint4-layers", "2")
        invoke("wint2", folder / "paddle", folder / "wint2-tp2", "--wint4-layers", "2", "--tp", "2")
        invoke("wint4", folder / "paddle", folder / "wint4", "--runtime", "fastdeploy")
    return folder


def lines(found: Inspection) -> dict[str, list[tuple[str, int, float]]]:
    """Role -> its forms: weights, bits per weight."""
    table: dict[str, list[tuple[str, int, float]]] = {}
    for form in found.forms:
        table.setdefault(form["role"], []).append((form["form"], form["weights"], form["bits_per_weight"]))
    return table


@pytest.mark.parametrize(
    ("name", "title", "layout", "role", "forms"),
    [
        # 32 codes and a bf16 scale; the packed shape, two int64 per weight of 32 x 64, are 1/16 bit
        ("int4", "quantized for vllm (compressed-tensors, pack-quantized)", "PT", "experts", [("int4, group 32", 48, 4.5625)]),
        ("int8", "quantized for vllm (compressed-tensors, pack-quantized)", "PT", "mlp", [("int8, per channel", 3, 8.224)]),
        ("fp8", "quantized for vllm (fp8)", "PT", "experts", [("fp8, blocks 128x128", 6, 8.002)]),
        ("wint2", "quantized for fastdeploy (wint2, w4w2, wint8)", "Paddle", "experts",
         [("int4 (-7 to 7), per channel", 6, 4.0521), ("wint2 (CCQ), group 64", 6, 2.3229)]),
        ("wint2-tp2", "quantized for fastdeploy (wint2, w4w2, wint8)", "Paddle", "experts",
         [("int4 (-7 to 7), per channel", 6, 4.0521), ("wint2 (CCQ), group 64", 6, 2.3229)]),
        ("wint2", "quantized for fastdeploy (wint2, w4w2, wint8)", "Paddle", "attention", [(INT8, 6, 8.0625)]),
        ("wint4", "quantized for fastdeploy (wint2, w4w2, wint8)", "Paddle", "mtp", [("BF16", 5, 16.0), (INT8, 4, 8.0556)]),
    ],
)  # fmt: skip
def test_our_own_results(made: Path, name: str, title: str, layout: str, role: str, forms: list[Any]) -> None:
    found = inspect(made / name)
    assert (found.quantized, found.layout, found.anomalies) == (title, layout, ())
    assert lines(found)[role] == forms
    assert found.ranks == (2 if name == "wint2-tp2" else 1)
    assert sum(f["weights"] for f in found.forms) == sum(r["tensors"] for r in found.roles.values())
    assert lines(found)["router"] == [("F32", *lines(found)["router"][0][1:])]


def test_people_see_forms_and_the_sum(made: Path, command: Command) -> None:
    code, out, err = command("inspect", made / "int4")
    assert (code, err) == (0, "")
    shown = [line.split() for line in out.splitlines()]
    assert out.splitlines()[0].endswith(": ernie4_5_moe, PT layout, quantized for vllm (compressed-tensors, pack-quantized)")
    assert ["experts", "int4,", "group", "32", "48", "4.562", "0.000"] in shown
    assert ["all", "82", "10.932", "0.000"] in shown
    assert out.endswith("\nno anomalies\n")
    assert json.loads(command("inspect", made / "int4", "--json")[1])["forms"][0]["form"] == "int4, group 32"


def test_a_plain_checkpoint_has_no_forms() -> None:
    found = inspect(GOLDEN / "moe/pt")
    assert (found.quantized, found.forms) == ("", ())


def test_what_is_wrong_with_a_quantized_one_is_an_anomaly(made: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made / "int4", tmp_path / "out"))
    tensors = read_file(out / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale"]
    write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    assert sorted(inspect(out).anomalies) == [
        "model.layers.1.mlp.experts.0.up_proj.weight_scale: is not there, config.json (int4, group 32, mse) wants BF16 (32, 2)",
        "model.norm.weight: is missing",
    ]


# --- those of others ---------------------------------------------------------------------------------------------------


def gptq(module: str, out: int, width: int) -> dict[str, torch.Tensor]:
    """4 bits in groups of 128, inputs first."""
    return {
        f"{module}.qweight": torch.zeros(width // 8, out, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(width // 128, out // 8, dtype=torch.int32),
        f"{module}.scales": torch.zeros(width // 128, out, dtype=torch.float16),
        f"{module}.g_idx": torch.zeros(width, dtype=torch.int32),
    }


def bitsandbytes(module: str, out: int, width: int) -> dict[str, torch.Tensor]:
    """nf4: two weights to a byte, a scale for 64 of them."""
    return {
        f"{module}.weight": torch.zeros(out * width // 2, 1, dtype=torch.uint8),
        f"{module}.weight.absmax": torch.zeros(out * width // 64),
        f"{module}.weight.quant_map": torch.zeros(16),
        f"{module}.weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }


def float8_per_channel(module: str, out: int, width: int) -> dict[str, torch.Tensor]:
    """As llm-compressor's FP8_DYNAMIC."""
    return {
        f"{module}.weight": torch.zeros(out, width).to(torch.float8_e4m3fn),
        f"{module}.weight_scale": torch.zeros(out, 1, dtype=torch.bfloat16),
    }


def packed(module: str, out: int, width: int) -> dict[str, torch.Tensor]:
    """As llm-compressor's W4A16."""
    return {
        f"{module}.weight_packed": torch.zeros(out, width // 8, dtype=torch.int32),
        f"{module}.weight_scale": torch.zeros(out, width // 128, dtype=torch.bfloat16),
        f"{module}.weight_shape": torch.tensor([out, width]),
    }


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}}


@pytest.mark.parametrize(
    ("write", "config", "title", "form", "bits"),
    [
        (gptq, {"quant_method": "gptq", "bits": 4}, "quantized (gptq)", "int4, a scale per 128 weights", 4.4062),
        (bitsandbytes, {"quant_method": "bitsandbytes"}, "quantized (bitsandbytes)", "int4, a scale per 64 weights", 4.5752),
        (float8_per_channel, {"quant_method": "compressed-tensors", "format": "float-quantized"},
         "quantized (compressed-tensors, float-quantized)", "float8, a scale per 128 weights", 8.125),
        (packed, {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [], "config_groups": {"g": GROUP}},
         "quantized (compressed-tensors, pack-quantized)", "int4, a scale per 128 weights", 4.1328),
        (packed, None, "quantized (config.json does not say how)", "int4, a scale per 128 weights", 4.1328),
    ],
)  # fmt: skip
def test_those_of_other_programs(
    tmp_path: Path, write: Callable[..., dict[str, torch.Tensor]], config: Any, title: str, form: str, bits: float
) -> None:
    settings, tensors = wide()
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors |= write(name.removesuffix(".weight"), *tensors.pop(name).shape)
    folder = write_model(tmp_path / "m", settings | ({"quantization_config": config} if config else {}), tensors)
    found = inspect(folder)
    assert (found.quantized, found.anomalies) == (title, ())
    assert lines(found)["experts"] == [(form, 6, bits)]
    assert lines(found)["norms"] == [("BF16", 5, 16.0)]
    assert found.notes[-1].startswith("what it is was taken from the sizes of its tensors; no command here reads it: ")


def test_a_tensor_of_others_that_is_missing_and_one_that_nobody_knows(tmp_path: Path) -> None:
    settings, tensors = wide()
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors |= gptq(name.removesuffix(".weight"), *tensors.pop(name).shape)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_scale"] = torch.zeros(1)
    found = inspect(write_model(tmp_path / "m", settings | {"quantization_config": {"quant_method": "gptq"}}, tensors))
    assert found.anomalies == ("model.norm.weight: is missing",)
    assert "of no weight that is known: model.layers.0.self_attn.k_scale" in found.notes
