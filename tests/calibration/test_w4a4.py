"""NVFP4 with inputs in float4: what calibration measures of a text, what the files hold, and what `eval` makes of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ernie_quant.calibration import forward
from ernie_quant.calibration.opened import readable
from ernie_quant.calibration.targets import Largest
from ernie_quant.calibration.tokenizer import tokenizer_of
from ernie_quant.calibration.windows import windows
from helpers.bits import gaussian
from helpers.commands import Command, refusal
from helpers.disk import contents, no_waiting
from helpers.models import GOLDEN, config, copy, invoke, random_model, tensors
from helpers.plain_nvfp4 import rounded
from helpers.runs import Killed
from helpers.words import byte_tokenizer
from safetensors.torch import save_file

from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.planning import built_in
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.weights import layouts

TOKENS = 1024
SHAPE: dict[str, object] = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "moe_num_experts": 4, "moe_k": 2, "num_hidden_layers": 3, "moe_layer_end_index": 2,
    "vocab_size": 256,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_once() -> Any:
    with no_waiting():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, larger than the helper's, so that something happens in it."""
    folder = random_model(tmp_path_factory.mktemp("w4a4") / "source", layouts.PT, "moe_mtp", **SHAPE, moe_num_shared_experts=1)
    table = {name: tensor * (4 if tensor.dim() == 2 else 1) for name, tensor in tensors(folder).items()}
    table |= {name: 1 + tensor for name, tensor in table.items() if name.endswith("norm.weight")}
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return byte_tokenizer(folder)


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    file = source.with_name("text.txt")
    file.write_text("".join(f"{n} is {'odd' if n % 2 else 'even'} and {n * n}.\n" for n in range(200)))
    return file


def quantized(source: Path, text: Path, out: Path, *options: object) -> Path:
    told = ("--activations", "fp4", "--calibration", text, "--calibration-tokens", TOKENS, "--quiet")
    with no_waiting():
        invoke("nvfp4", source, out, *told, *options)
    return out


@pytest.fixture(scope="module")
def out(source: Path, text: Path) -> Path:
    return quantized(source, text, source.with_name("out"), "--mtp")


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 300.0])
def test_inputs_are_rounded_as_the_specification_says(magnitude: float) -> None:
    x = (gaussian(64, 256).float() / 0.02 * magnitude).bfloat16()
    x[3], x[5, :16] = 0, 0
    largest = float(x.abs().max())
    for of_all in (2688 / largest, 3 * 2688 / largest, 2.0 ** math.floor(math.log2(2688 / largest))):
        scale = torch.tensor([of_all])  # of the second, inputs beyond those of the text are cut off
        found, expected = NvFloat4Inputs().rounded(x.float(), scale), rounded(x.float().numpy(), float(scale))
        differ = np.abs(found.numpy() - expected) > 1e-6 * np.abs(expected)
        assert differ.mean() <= 2e-3  # ties, before which stands a product with a rounded 1 / scale
        assert float(found.abs().max()) <= 2688 / of_all * 1.001


def test_the_largest_is_never_cut_off_where_groups_have_scales_of_their_own() -> None:
    largest = Largest(NvFloat4Inputs())
    largest.add(torch.tensor([[1.0, -3.0]]))
    assert float(largest.known([(torch.ones(1, 2), torch.ones(1))], torch.ones(2))["largest"]) == 3.0


def test_scales_of_inputs_are_of_the_largest_in_the_stream_of_the_quantized_model(source: Path, text: Path, out: Path) -> None:
    """Those of the first layer, whose inputs are exact, are those of the source's own pass: 448 x 6 / max|x|."""
    stored = tensors(out)
    scales = {name.removesuffix(".input_global_scale"): t for name, t in stored.items() if name.endswith("input_global_scale")}
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith("weight_packed")}
    assert all(scale.dtype == torch.float32 and scale.shape == (1,) and 0 < float(scale) < 1e6 for scale in scales.values())
    assert {name for name in packed if "mtp_block" not in name} == scales.keys()
    assert any("mtp_block" in name for name in packed)
    places = {name.rpartition(".")[0] for name in scales}
    for place in places:
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            found = {float(scales[f"{place}.{name}"]) for name in together if f"{place}.{name}" in scales}
            assert len(found) <= 1, place
    ids = windows(tokenizer_of(source), (text,), TOKENS, seed=0).ids
    seen: dict[str, float] = {}

    def observe(point: str, inputs: torch.Tensor, heard: torch.Tensor | None) -> None:
        seen[point] = max(seen.get(point, 0.0), float(inputs.bfloat16().abs().max()))

    with readable(source).read(range(0, 3)) as opened, torch.no_grad():
        forward.attention(opened.model, 0, forward.start(opened.model, ids), observe)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert float(scales[f"model.layers.0.self_attn.{name}"]) == pytest.approx(2688 / seen[forward.QKV], rel=1e-6)
    assert float(scales["model.layers.0.self_attn.o_proj"]) == pytest.approx(2688 / seen[forward.O_PROJ], rel=0.1)


def test_config_json_says_it_of_all_but_the_mtp_block(out: Path) -> None:
    groups = config(out)["quantization_config"]["config_groups"].values()
    assert {group["format"] for group in groups} == {"nvfp4-pack-quantized"}
    (inputs,) = [group["input_activations"] for group in groups if "input_activations" in group]
    assert inputs == {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    assert len(groups) == 2


def test_the_weights_are_those_without_a_text(source: Path, out: Path, tmp_path: Path) -> None:
    invoke("nvfp4", source, tmp_path / "alone", "--mtp", "-q")
    alone, there = tensors(tmp_path / "alone"), tensors(out)
    assert {name for name in there if name not in alone} == {name for name in there if name.endswith("input_global_scale")}
    assert all(torch.equal(tensor.view(torch.uint8), there[name].view(torch.uint8)) for name, tensor in alone.items())


def test_it_is_verified_dequantized_and_inspected(source: Path, out: Path, tmp_path: Path) -> None:
    invoke("verify", out, "--against", source, "--full")
    assert "nvfp4, group 16, fp4 inputs" in invoke("inspect", out)
    invoke("dequantize", out, tmp_path / "plain", "--to", "pt", "-q")
    assert tensors(tmp_path / "plain").keys() == tensors(source).keys()


def test_a_killed_run_goes_on_to_the_same_bytes(
    source: Path, text: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_quant.calibration.state import State

    finish, done = State.finish, []

    def killed(self: State, layer: int, *rest: Any) -> None:
        finish(self, layer, *rest)
        done.append(layer)
        if layer == 1 and len(done) == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(State, "finish", killed)
        with pytest.raises(Killed):
            quantized(source, text, tmp_path / "out", "--mtp")
    assert done == [0, 1]
    quantized(source, text, tmp_path / "out", "--mtp")
    assert contents(tmp_path / "out") == contents(out)


def test_eval_rounds_the_inputs_and_says_so(source: Path, text: Path, out: Path, tmp_path: Path) -> None:
    def said(*options: object) -> dict[str, Any]:
        return json.loads(invoke("eval", out, "--against", source, "--text", text, "--tokens", 511, "--json", *options))

    rounded, weights_only = said(), said("--weights-only")
    assert "float4 activations, simulated" in json.dumps(rounded)
    assert "float4 activations, left out" in json.dumps(weights_only)
    plain = tmp_path / "plain"
    invoke("dequantize", out, plain, "--to", "pt", "-q")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, plain / name)
    decoded = json.loads(invoke("eval", plain, "--against", source, "--text", text, "--tokens", 511, "--json"))
    kl = [found["together"]["kl"]["value"] for found in (weights_only, decoded, rounded)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-6)
    assert kl[2] > 1.2 * kl[0] > 0


def test_a_text_for_weights_alone_is_refused(command: Command, source: Path, text: Path, tmp_path: Path) -> None:
    said = refusal(command, "nvfp4", source, tmp_path / "out", "--calibration", text)
    assert "nvfp4 takes the nearest codes whatever a text says; leave it out" in said


def test_models_that_see_images_are_refused(command: Command, text: Path, tmp_path: Path) -> None:
    source = byte_tokenizer(copy(GOLDEN / "vl/pt", tmp_path / "vl"))
    code, _, said = command("nvfp4", source, tmp_path / "out", "--activations", "fp4", "--calibration", text)
    assert code == 1
    assert "fp4 inputs are for text models: scales are measured on text, and images bring other inputs" in said


def test_the_plan_names_the_form(source: Path) -> None:
    made = built_in.make("nvfp4", activations="fp4", mtp=True)
    assert made.recipe.words == "nvfp4 --mtp --activations fp4"
    with pytest.raises(Exception, match="nvfp4 wants --calibration"):
        make_plan(open_source(source), runtime="vllm", recipe=made.recipe)
