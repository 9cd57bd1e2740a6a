"""NVFP4: the compiled kernel against plain torch, its files against a decoder written from the specification."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bits import ODD_WEIGHTS, gaussian, same
from helpers.commands import Command, refusal
from helpers.models import GOLDEN, config, dequantized, invoke, random_model, tensors
from helpers.plain_nvfp4 import decoded, e4m3
from helpers.results import WIDTHS
from safetensors import safe_open

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import LARGEST_WEIGHT
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4, global_scale
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
from ernie_quant.errors import ErnieQuantError, PlanError
from ernie_quant.kernels import nvfp4, nvfp4_reference
from ernie_quant.measure import squares
from ernie_quant.planning import built_in
from ernie_quant.runtimes import Place, _commands, _float4, vllm
from ernie_quant.weights import layouts

SPEC = TensorSpec((64, 256), "BF16")


@pytest.mark.parametrize("scale", [2.0**11, 1.0, 2.0**116, 2.0**-116])
@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_it_is_the_plain_one(name: str, scale: float) -> None:
    weight, of_all = ODD_WEIGHTS[name](), torch.tensor([scale])
    codes, scales, lost = nvfp4.encode(weight, scale)
    plain_codes, plain_scales = nvfp4_reference.encode(weight, scale)
    assert same(codes, plain_codes)
    assert same(scales, plain_scales)
    assert int(scales.min()) >= 1
    assert int(scales.max()) <= 126  # positive, and finite
    decoded = nvfp4.decode(codes, scales, of_all)
    assert same(decoded, nvfp4_reference.decode(codes, scales, of_all))
    assert decoded.isfinite().all()
    assert same(nvfp4.codes(decoded, scales, of_all), codes)
    difference = squares(weight, decoded)
    assert lost == (pytest.approx(difference.error, 1e-12), pytest.approx(difference.total, 1e-12), difference.largest)


def test_every_byte_of_a_scale_is_read() -> None:
    """Those that are never written, too: negative ones, 0, and a global scale that is no power of two."""
    scales = torch.arange(256).to(torch.uint8).reshape(16, 16)
    codes = torch.arange(16).to(torch.uint8).repeat(16, 16)
    for of_all in (1.0, 512.0, 1234.5):
        found = nvfp4.decode(codes, scales, torch.tensor([of_all]))
        plain = nvfp4_reference.decode(codes, scales, torch.tensor([of_all]))
        assert torch.equal(found.isnan(), plain.isnan())
        assert torch.equal(found.nan_to_num(), plain.nan_to_num())
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        expected = torch.from_numpy(decoded(packed.numpy(), scales.numpy(), of_all)).float()
        assert torch.allclose(found.float(), expected, rtol=2.0**-8, equal_nan=True)


def by_hand(*values: float, scale: float = 1.0) -> tuple[list[int], int]:
    """Codes and scale of a group that begins with `values`, and is 0 after them."""
    weight = torch.zeros(1, 16)
    weight[0, : len(values)] = torch.tensor(values)
    codes, scales, _ = nvfp4.encode(weight, scale)
    return codes[0, : len(values)].tolist(), int(scales)


def test_codes_by_hand() -> None:
    """The largest is 6, so 1 (0x38) is the scale: all values of e2m1, and the ties that go to the even code."""
    assert by_hand(0, 0.5, 1, 1.5, 2, 3, 4, 6) == ([0, 1, 2, 3, 4, 5, 6, 7], 0x38)
    assert by_hand(6, -0.5, -1, -1.5, -2, -3, -4, -6) == ([7, 9, 10, 11, 12, 13, 14, 15], 0x38)
    assert by_hand(6 * 1.25, 1.25) == ([7, 2], 0x3A)  # 1.25 = 0 0111 010
    assert by_hand(6 * 448.0) == ([7], 0x7E)
    assert by_hand(6 * 2.0**-9) == ([7], 0x01)
    assert by_hand(0.75, 0.125, scale=8.0) == ([7, 2], 0x38)
    assert by_hand(0.0, 0.0) == ([0, 0], 0x38)


def test_a_scale_that_puts_the_largest_at_four_is_taken_where_it_is_nearer() -> None:
    """5 / 6 is no e4m3; 4 and 5 at the scale 1.25 are 3.2 and 4, at 1 they are 4 and 4 or 6."""
    codes, scale = by_hand(*[4.0] * 8, *[1.0] * 8)  # a third of it would be 2, exact too: the first of equal ones
    assert [float(e4m3(np.uint8(scale))) * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code] for code in codes] == [4.0] * 8 + [1.0] * 8
    codes, scale = by_hand(5.0, *[2.5] * 4, *[3.75] * 4)  # 4, 2 and 3 times 1.25
    assert (codes, scale) == ([6, *[4] * 4, *[5] * 4], 0x3A)


def test_the_number_for_all_scales_is_a_power_of_two() -> None:
    assert global_scale(2688.0) == 1.0
    assert global_scale(2689.0) == 0.5
    assert global_scale(1.0) == 2048.0
    assert global_scale(0.0) == 1.0
    for largest in (1e-45, 1e-38, 1e-30, 0.02, 1e30, 3e38):
        found = global_scale(largest)
        assert math.frexp(found)[0] == 0.5
        assert 2.0**-116 <= found <= 2.0**116
        if 1e-30 <= largest <= 1e30:
            assert 1344 < largest * found <= 2688


def test_what_is_no_number_is_seen() -> None:
    weight = torch.ones(2, 64)
    weight[0, 3], weight[1, 40] = math.nan, -math.inf
    codes, scale, lost = nvfp4.encode(weight, 2048.0)
    plain_codes, plain_scale = nvfp4_reference.encode(weight, 2048.0)
    assert same(codes, plain_codes)
    assert same(scale, plain_scale)
    assert not math.isfinite(lost[1])


def prepared(weight: torch.Tensor, largest: float | None = None) -> tuple[dict[str, torch.Tensor], Any]:
    encoder = NvFloat4().prepare(SPEC, {LARGEST_WEIGHT: weight.abs().max()[None] if largest is None else torch.tensor([largest])})
    assert encoder is not None
    encoded, lost = encoder.measured(weight)  # type: ignore[attr-defined]
    return {**encoder.once, **encoded}, lost


def test_it_has_the_error_of_int4_of_the_same_size() -> None:
    """What help, notes and docs/formats.md say: 4.5 bits each. Without a search it would be .0090."""
    weight = gaussian(512, 4096)
    float4 = prepared(weight)[1].rel_error
    int4 = RoundToNearest(4, 32).measured(weight)[1].rel_error
    mxfp4 = Float4Group().measured(weight)[1].rel_error
    assert float4 <= 0.0067
    assert int4 <= 0.0069
    assert 0.95 <= float4 / int4 <= 1.0
    assert float4 / mxfp4 <= 0.55
    spec = TensorSpec((512, 4096), "BF16")
    assert RoundToNearest(4, 32).bits_per_weight(spec) == 4.5
    assert NvFloat4().bits_per_weight(spec) == pytest.approx(4.5, abs=2e-5)
    x, scale = weight.float().reshape(-1, 16), weight.float().abs().max() / 2688
    plain = ((x.abs().amax(1, keepdim=True) / 6 / scale).to(torch.float8_e4m3fn).float() * scale).clamp(min=1e-30)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = values[((x / plain).abs()[..., None] - values).abs().argmin(-1)] * x.sign() * plain
    assert 0.0089 <= float((nearest - x).square().sum() / x.square().sum()) <= 0.0092


@pytest.mark.parametrize("ratio", [1.0, 2.0**-4, 2.0**-10])
def test_a_weight_beside_a_much_larger_one_loses_little(ratio: float) -> None:
    """Float8 has 2**15 of range without denormals: a layer may be a thousandth of the other and is as near as before."""
    weight = gaussian(64, 256)
    alone = prepared(weight)[1].rel_error
    assert prepared(weight, float(weight.abs().max()) / ratio)[1].rel_error <= 1.02 * alone
    assert prepared(weight, float(weight.abs().max()) * 2.0**18)[1].rel_error < 0.2  # denormal scales: coarse, and no nonsense


@pytest.mark.parametrize("magnitude", [2.0**-130, 2.0**-120, 1e-30, 1e30])
def test_any_magnitude(magnitude: float) -> None:
    weight = (gaussian(64, 256).float() / 0.02 * magnitude).bfloat16()
    encoded, lost = prepared(weight)
    decoded = NvFloat4().decode(encoded)
    assert decoded.isfinite().all()
    assert encoded["global_scale"].isfinite().all()
    assert lost.rel_error <= (0.0075 if 1e-30 <= magnitude <= 1e30 else 1.0)
    assert same(NvFloat4().recode(decoded, encoded)["codes"], encoded["codes"])


def test_zeros() -> None:
    encoded, lost = prepared(torch.zeros(64, 256))
    assert not encoded["codes"].any()
    assert (encoded["scale"] == 0x38).all()
    assert float(encoded["global_scale"]) == 1.0
    assert lost.error == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_largest_weight_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ErnieQuantError, match="not one finite number"):
        prepared(gaussian(64, 256), bad)


def test_compressed_tensors_reads_a_weight_the_same() -> None:
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    encoded, _ = prepared(gaussian(64, 256))
    stored = {**vllm.pack("m.weight", NvFloat4(), encoded), **vllm.constants("m.weight", NvFloat4(), SPEC, encoded)}
    scheme = QuantizationScheme(targets=["Linear"], weights=_float4.NV)
    state = {name.removeprefix("m."): tensor for name, tensor in stored.items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight_packed": (torch.uint8, (64, 128)),
        "weight_scale": (torch.float8_e4m3fn, (64, 16)),
        "weight_global_scale": (torch.float32, (1,)),
    }
    found = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(found.bfloat16(), NvFloat4().decode(encoded))
    known = {
        *NVFP4PackedCompressor.compression_param_names(scheme),
        "input_global_scale",
    }  # 0.17 says the latter, 0.20 leaves it out
    inputs = vllm.parts("m.weight", NvFloat4Inputs(), SPEC)
    assert {name.removeprefix("m.") for name in inputs} == known
    both = QuantizationScheme(targets=["Linear"], **_float4.scheme(NvFloat4Inputs()))
    assert both.input_activations is not None
    assert both.input_activations.dynamic == "local"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if "_scale" in name or ".weight_" in name}  # noqa: SIM118


@pytest.mark.parametrize("layout", [layouts.PT, layouts.PADDLE])
def test_the_files_hold_what_the_specification_says(layout: str, tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", layout, "moe", **WIDTHS["moe"])
    invoke("nvfp4", source, tmp_path / "out", "-q")
    invoke("verify", tmp_path / "out", "--against", source, "--full")
    invoke("convert", source, tmp_path / "plain", "--to", "pt", "-q")
    found, plain, originals = (
        stored(tmp_path / "out"),
        tensors(dequantized(tmp_path / "out", tmp_path / "d")),
        tensors(tmp_path / "plain"),
    )
    modules = sorted({name.rpartition(".")[0] for name in found})
    assert any("self_attn" in module for module in modules)
    assert {name.rpartition(".")[2] for name in found} == {"weight_packed", "weight_scale", "weight_global_scale"}
    for module in modules:
        packed, scale, of_all = (found[f"{module}.weight_{part}"] for part in ("packed", "scale", "global_scale"))
        assert (packed.dtype, scale.dtype, of_all.dtype, of_all.shape) == (torch.uint8, torch.float8_e4m3fn, torch.float32, (1,))
        bits = scale.view(torch.uint8)
        assert int(bits.max()) < 0x7F  # a negative one would be more
        values = decoded(packed.numpy(), bits.numpy(), float(of_all))
        assert np.array_equal(values, plain[f"{module}.weight"].double().numpy()), module
        original = originals[f"{module}.weight"].double().numpy()
        assert 0 < ((values - original) ** 2).sum() / (original**2).sum() < 0.009, module
    (group,) = config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["format"] == "nvfp4-pack-quantized"
    assert group["weights"] == {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    assert "input_activations" not in group
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "nvfp4, group 16" in {tensor["codec"] for tensor in report["tensors"]}
    assert "nvfp4" in invoke("inspect", tmp_path / "out")
    invoke("dequantize", tmp_path / "out", tmp_path / "back", "--to", "pt", "-q")
    back = tensors(tmp_path / "back")
    assert all(same(back[f"{module}.weight"], plain[f"{module}.weight"]) for module in modules)


PARTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def layers_of(folder: Path) -> dict[str, dict[str, float]]:
    """Layer in memory -> its linears -> their global scale."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith("weight_global_scale"):
                    place, _, linear = name.removesuffix(".weight_global_scale").rpartition(".")
                    found[f"{place}.{PARTS.get(linear, linear)}"][linear] = float(opened.get_tensor(name))
    return found


def uneven(folder: Path, layout: str, family: str = "moe_mtp") -> Path:
    """A model whose up_proj and k_proj are larger than what stands beside them by factors of up to 1000."""
    from safetensors.torch import save_file

    random_model(folder, layout, family, **WIDTHS[family], moe_num_shared_experts=1)
    table = tensors(folder)
    for number, name in enumerate(sorted(table)):
        if ("up_proj" in name and "gate" not in name) or "k_proj" in name:
            table[name] = (table[name].float() * (3.7, 100.0, 1000.0)[number % 3]).to(table[name].dtype)
        elif "up_gate_proj" in name or "qkv_proj" in name:
            half = table[name].shape[1] // 2
            table[name][:, half:] = (table[name][:, half:].float() * (3.7, 100.0, 1000.0)[number % 3]).to(table[name].dtype)
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", [layouts.PT, layouts.PADDLE])
def test_what_is_one_layer_in_memory_has_one_number_for_all_scales(layout: str, tmp_path: Path) -> None:
    """Every pair of the result, of experts, shared ones, a dense layer and the MTP block: vLLM takes one for all."""
    source = uneven(tmp_path / "source", layout)
    invoke("convert", source, tmp_path / "plain", "--to", "pt", "-q")
    invoke("nvfp4", source, tmp_path / "out", "--mtp", "--max-shard-size", "100KB", "-q")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    invoke("verify", tmp_path / "out", "--against", source)
    originals, layers = tensors(tmp_path / "plain"), layers_of(tmp_path / "out")
    several = {place: of for place, of in layers.items() if len(of) > 1}
    assert {place.rpartition(".")[2] for place in several} == {"qkv", "gate_up"}
    assert any("mtp_block" in place for place in several)
    assert any("shared_experts" in place for place in several)
    assert any("experts.1." in place for place in several)
    assert all(set(of) in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}) for of in several.values())
    differ = 0
    for place, of in layers.items():
        assert len(set(of.values())) == 1, place
        each = {name: float(originals[f"{place.rpartition('.')[0]}.{name}.weight"].abs().max()) for name in of}
        assert next(iter(of.values())) == 2.0 ** math.floor(math.log2(2688 / max(each.values()))), place
        differ += max(each.values()) > 3 * min(each.values())
    assert differ > 5


def test_a_pair_in_two_files_of_the_source_and_a_run_in_shares_are_the_same(tmp_path: Path) -> None:
    """gate_proj in one file, up_proj in another, and files of the result written by processes that know nothing of each other."""
    from safetensors.torch import save_file

    source = uneven(tmp_path / "source", layouts.PT)
    invoke("nvfp4", source, tmp_path / "whole", "-q", "--max-shard-size", "100KB")
    table = tensors(source)
    cut = {"a": {n: t for n, t in table.items() if "up_proj" in n}, "b": {n: t for n, t in table.items() if "up_proj" not in n}}
    (source / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate(cut.values(), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, source / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    invoke("nvfp4", source, tmp_path / "two", "-q", "--max-shard-size", "100KB", "--workers", "2")
    for number in range(3):
        invoke(
            "nvfp4", source, tmp_path / "shares", "-q", "--max-shard-size", "100KB", "--shard-index", number, "--num-shards", 3
        )
    invoke("merge", tmp_path / "shares", "-q")
    files = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 5
    for name in files:
        for out in ("two", "shares"):
            assert (tmp_path / out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (out, name)


def test_a_weight_that_is_no_number_is_named_and_its_neighbour_is_not(command: Command, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDTHS["moe"])
    table = tensors(source)
    table["model.layers.1.mlp.experts.1.up_proj.weight"][3, 5] = math.nan
    save_file(table, source / "model.safetensors", metadata={"format": "pt"})
    said = refusal(command, "nvfp4", source, tmp_path / "out", "-q")
    assert "model.layers.1.mlp.experts.1.up_proj.weight: holds" in said
    assert "gate_proj" not in said


def test_widths_that_16_does_not_divide_are_refused_by_name() -> None:
    assert NvFloat4().problem(TensorSpec((64, 24), "BF16")) == (
        "groups of 16 do not divide 24 inputs; int4 or int8 per channel would"
    )


def test_others_have_no_form_of_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nvfp4 is not stored for fastdeploy; it is for vllm, transformers"):
        built_in.make("nvfp4", "fastdeploy")
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nrole = "experts"\ncodec = "nvfp4"\n')
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDTHS["moe"])
    invoke("quantize", source, tmp_path / "out", "--recipe", rules, "-q")
    assert layers_of(tmp_path / "out")


def test_transformers_by_itself_would_decode_it_wrongly(tmp_path: Path) -> None:
    """So the card has no command without our quantizer (tests/serving: what it decodes with it)."""
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDTHS["moe"])
    invoke("nvfp4", source, tmp_path / "out", "--experts-only", "-q")
    card = (tmp_path / "out/README.md").read_text()
    assert "vLLM >= 0.32" in card
    assert "import ernie_quant.transformers; from transformers" in card


def test_with_inputs_in_float4_it_is_for_vllm_alone(command: Command, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nrole = "experts"\ncodec = "w4a4"\n')
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDTHS["moe"])
    code, _, said = command("quantize", source, tmp_path / "out", "--recipe", rules, "--runtime", "transformers")
    assert code == 1
    assert "nvfp4, group 16, fp4 inputs is computed by vLLM alone; --runtime vllm" in said
    group = {"format": "nvfp4-pack-quantized", "targets": ["re:x"], "input_activations": {"num_bits": 4}}
    entry = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert _commands.transformers(Place("out"), {"quantization_config": entry}) == []


def test_the_plan_says_what_it_is_for(tmp_path: Path) -> None:
    said = invoke("nvfp4", GOLDEN / "moe/pt", tmp_path / "out", "--dry-run", "--json")
    assert "gains nothing" in said
    assert "wint4 --group-size 32 has as many bits (4.5) and the same error" in said


def test_inputs_in_float4_want_a_text(command: Command, tmp_path: Path) -> None:
    code, _, said = command("nvfp4", GOLDEN / "moe/pt", tmp_path / "out", "--activations", "fp4")
    assert code == 2
    assert "--activations fp4 wants --calibration auto or --calibration FILE" in said
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nrole = "experts"\ncodec = "w4a4"\n')
    code, _, said = command("quantize", GOLDEN / "moe/pt", tmp_path / "out", "--recipe", rules)
    assert code == 1
    assert "rules wants --calibration: w4a4 have scales of activations, which are measured on text" in said
