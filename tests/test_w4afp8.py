"""W4AFP8: the files of int4 in groups of 128 with positive scales, and what config.json says of the inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bits import gaussian
from helpers.commands import Command
from helpers.hessians import statistics_of
from helpers.models import GOLDEN, config, dequantized, invoke, random_model, tensors
from helpers.results import sealed
from safetensors import safe_open

from ernie_quant import codecs, runtimes
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.errors import PlanError
from ernie_quant.measure import squares
from ernie_quant.names import EXPERT, IN, MLP, OUT
from ernie_quant.planning import built_in
from ernie_quant.runtimes import Linear, Place, Spread
from ernie_quant.weights import layouts

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256, "moe_num_experts": 2}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def as_vllm_has_it(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """f64 [N, K]: scales of a row in float8 by the largest of them, an eighth of these, and a float32 scale of the row."""
    scale = scale.float()
    row = scale.abs().amax(1, keepdim=True) / 448
    eighths = ((scale / row).to(torch.float8_e4m3fn).float() / 8).to(torch.float8_e4m3fn).double()
    return (codes.double().reshape(*scale.shape, -1) * (eighths * row * 8)[..., None]).reshape(codes.shape)


@pytest.mark.parametrize("codec", [Weight4Float8(), Weight4Float8(scale="absmax"), Weight4Float8(method="descent")])
def test_scales_are_positive(codec: Weight4Float8) -> None:
    weight = gaussian(256, 512)
    weight[3, 128:256], weight[5] = 0, 0
    encoder = codec.prepare(TensorSpec((256, 512), "BF16"), statistics_of(codec, TensorSpec((256, 512), "BF16")))
    for encoded in (codec.encode(weight), (encoder or codec).encode(weight)):
        assert (encoded["scale"] > 0).all()
        assert encoded["codes"].min() == (-8 if codec.scale == "mse" else -7)


def test_a_group_of_zeros_does_not_blur_the_scales_of_its_row() -> None:
    """A scale of 1 beside those of its row would take all bits that float8 has."""
    weight = gaussian(4, 512).float() * 2.0**-10
    weight[1, 128:256] = 0
    encoded = Weight4Float8().encode(weight)
    scale = encoded["scale"][1].float()
    assert scale[1] == min(scale[0], scale[2], scale[3])
    assert not encoded["codes"][1, 128:256].any()
    usual = RoundToNearest(4, 128).encode(weight)
    assert usual["scale"][1, 1] == 1


def test_what_vllm_makes_of_the_scales_is_what_the_documents_say() -> None:
    """Of Gaussian weights: .0104 as stored, .0111 with scales in float8; signed ones would be .0095 and .0102."""
    weight = gaussian(512, 4096)
    found = {}
    for name, codec in {"positive": Weight4Float8(), "signed": RoundToNearest(4, 128)}.items():
        encoded, lost = codec.measured(weight)
        found[name] = (lost.rel_error, squares(weight, as_vllm_has_it(encoded["codes"], encoded["scale"]).float()).rel_error)
    assert found["positive"] == (pytest.approx(0.01036, abs=1e-4), pytest.approx(0.0111, abs=1e-4))
    assert found["signed"] == (pytest.approx(0.0095, abs=1e-4), pytest.approx(0.0102, abs=1e-4))


def decoded(packed: np.ndarray, scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """f64 [N, K] of int32 words with eight codes + 8 each, the first in the lowest bits; scales f32 [N, K / 128]."""
    out = np.zeros(shape)
    for column in range(shape[1]):
        code = ((packed[:, column // 8].astype(np.int64) >> (4 * (column % 8))) & 15) - 8
        out[:, column] = code * scale[:, column // 128].astype(np.float64)
    return out


def test_the_files_are_those_of_int4_and_config_json_speaks_of_inputs(tmp_path: Path) -> None:
    source, out = random_model(tmp_path / "source", layouts.PT, "moe", **WIDE), tmp_path / "out"
    invoke("wint4", source, out, "--activations", "fp8", "-q")
    invoke("verify", out, "--against", source, "--full")
    invoke("wint4", source, tmp_path / "usual", "-q")
    assert {k: (v.shape, v.dtype) for k, v in tensors(out).items()} == {
        k: (v.shape, v.dtype) for k, v in tensors(tmp_path / "usual").items()
    }
    fp8, usual = (config(folder)["quantization_config"] for folder in (out, tmp_path / "usual"))
    (group,) = fp8["config_groups"].values()
    assert group.pop("input_activations") == INPUTS
    assert group["targets"].pop() == "Linear"  # for SGLang
    assert fp8 == usual
    found, plain = tensors(out), tensors(dequantized(out, tmp_path / "plain"))
    modules = [name.removesuffix(".weight_packed") for name in found if name.endswith(".weight_packed")]
    for module in modules[:: len(modules) // 4]:
        with safe_open(out / "model.safetensors", "np") as file:
            packed, shape = file.get_tensor(f"{module}.weight_packed"), tuple(file.get_tensor(f"{module}.weight_shape"))
        values = decoded(packed, found[f"{module}.weight_scale"].float().numpy(), shape)
        assert torch.equal(torch.from_numpy(values).bfloat16(), plain[f"{module}.weight"])
    assert "fp8 inputs" in invoke("inspect", out)
    card = (out / "README.md").read_text()
    assert "Hopper" in card
    assert "from transformers import" not in card


def test_verify_finds_inputs_that_config_json_says_something_else_of(tmp_path: Path, command: Command) -> None:
    source, out = random_model(tmp_path / "source", layouts.PT, "moe", **WIDE), tmp_path / "out"
    invoke("wint4", source, out, "--activations", "fp8", "--experts-only", "-q")
    said = config(out)
    for group in said["quantization_config"]["config_groups"].values():
        group["input_activations"]["strategy"] = "channel"
    (out / "config.json").write_text(json.dumps(said))
    code, text, error = command("verify", sealed(out))
    assert code != 0
    assert "none that this tool writes" in text + error


REFUSED = {
    ("--group-size", "64"): "wint4: activations fp8 goes with group_size 128 only, not 64",
    ("--group-size", "channel"): "wint4: activations fp8 goes with group_size 128 only, not channel",
    ("--runtime", "transformers"): "--activations does not go with --runtime transformers",
    ("--runtime", "fastdeploy"): "--activations does not go with --runtime fastdeploy",
}


@pytest.mark.parametrize(
    ("words", "expected"), REFUSED.items(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_what_does_not_go_with_it_is_refused_in_a_line(
    words: tuple[str, ...], expected: str, tmp_path: Path, command: Command
) -> None:
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDE)
    code, _, error = command("wint4", source, tmp_path / "out", "--activations", "fp8", *words)
    assert code != 0
    assert expected in error


def test_widths_of_vllms_kernels(tmp_path: Path, command: Command) -> None:
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDE | {"moe_intermediate_size": 384})
    code, _, error = command("wint4", source, tmp_path / "out", "--activations", "fp8", "--experts-only")
    assert code == 1
    assert "384 outputs and 256 inputs are not multiples of 256" in error
    vllm = runtimes.find("vllm")
    expert = Linear("model.layers.1.mlp.experts.0.down_proj.weight", TensorSpec((256, 1024), "BF16"), EXPERT, Weight4Float8(), IN)
    other = Linear("model.layers.1.mlp.gate_proj.weight", TensorSpec((1024, 384), "BF16"), MLP, Weight4Float8(), OUT)
    assert vllm.problems([expert, other]) == []
    assert [vllm.share_multiple(linear) for linear in (expert, other)] == [256, 128]


def test_inputs_that_are_no_groups_are_said_once(tmp_path: Path, command: Command) -> None:
    code, _, error = command("wint4", GOLDEN / "dense/pt", tmp_path / "out", "--activations", "fp8")
    assert code == 1
    assert "gate_proj.weight: groups of 128, the only ones for fp8 inputs, do not divide" in error
    assert "and 64 inputs are not multiples" not in error


def test_transformers_and_recipes(tmp_path: Path) -> None:
    linear = Linear("model.layers.1.mlp.experts.0.down_proj.weight", TensorSpec((256, 256), "BF16"), EXPERT, Weight4Float8(), IN)
    (problem,) = runtimes.find("transformers").problems([linear])
    assert problem == f"{linear.name}: int4, group 128, fp8 inputs, mse is computed by vLLM alone; --runtime vllm"
    with pytest.raises(PlanError, match="group_size 128"):
        codecs.make("w4afp8", {"group_size": 64})
    words = built_in.make("wint4", activations="fp8", experts_only=True).recipe.words
    assert words == "wint4 --experts-only --activations fp8"


def test_the_command_names_a_version_that_has_it() -> None:
    vllm = runtimes.find("vllm")
    linear = Linear("model.layers.1.mlp.experts.0.down_proj.weight", TensorSpec((256, 256), "BF16"), EXPERT, Weight4Float8(), IN)
    entry = {"quantization_config": vllm.quantization_config([linear])}
    assert [title for title, _ in vllm.commands(Place("x"), entry, Spread(1))] == ["vLLM >= 0.33, on Hopper"]
