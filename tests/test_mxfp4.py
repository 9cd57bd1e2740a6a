"""MXFP4: the compiled kernel against plain torch, its files against a decoder written from the specification."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.bits import ODD_WEIGHTS, gaussian, same
from helpers.models import GOLDEN, config, dequantized, invoke, random_model, tensors
from helpers.results import WIDTHS
from safetensors import safe_open

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import PlanError
from ernie_quant.kernels import mxfp4, mxfp4_reference
from ernie_quant.measure import squares
from ernie_quant.planning import built_in
from ernie_quant.weights import layouts


@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_it_is_the_plain_one(name: str) -> None:
    weight = ODD_WEIGHTS[name]()
    codes, scale, lost = mxfp4.encode(weight)
    plain_codes, plain_scale = mxfp4_reference.encode(weight)
    assert same(codes, plain_codes)
    assert same(scale, plain_scale)
    decoded = mxfp4.decode(codes, scale)
    assert same(decoded, mxfp4_reference.decode(codes, scale))
    assert decoded.isfinite().all()
    difference = squares(weight, decoded)
    assert lost == (pytest.approx(difference.error, 1e-12), pytest.approx(difference.total, 1e-12), difference.largest)


def by_hand(*values: float) -> tuple[list[int], int]:
    """Codes and scale of a group that begins with `values`, and is 0 after them."""
    weight = torch.zeros(1, 32)
    weight[0, : len(values)] = torch.tensor(values)
    encoded = Float4Group().encode(weight)
    return encoded["codes"][0, : len(values)].tolist(), int(encoded["scale"])


def test_codes_by_hand() -> None:
    """The largest is 6, so 2**0 = 1 is the scale: all values of e2m1, and the four ties that go to the even code."""
    assert by_hand(0, 0.5, 1, 1.5, 2, 3, 4, 6) == ([0, 1, 2, 3, 4, 5, 6, 7], 127)
    assert by_hand(6, -0.5, -1, -1.5, -2, -3, -4, -6) == ([7, 9, 10, 11, 12, 13, 14, 15], 127)
    assert by_hand(6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5) == ([7, 0, 2, 2, 4, 4, 6, 6], 127)
    assert by_hand(48, 8) == ([7, 2], 130)


def test_the_exponent_beside_that_of_the_specification_is_taken_where_it_is_nearer() -> None:
    """7.5 is cut to 6 at the scale 1, and 8 at 2. Many of 1/4, which are 0 at 1, outweigh that 4.1 is cut to 3 at 1/2."""
    assert by_hand(7.5) == ([6], 128)
    assert by_hand(4.1, *[0.25] * 8)[1] == 127
    assert by_hand(4.1, *[0.25] * 31)[1] == 126


def test_scales_stay_within_what_bf16_holds() -> None:
    assert by_hand(0.0, 0.0) == ([0, 0], 127)
    assert by_hand(2.0**-140) == ([0], 1)
    largest = float(torch.finfo(torch.bfloat16).max)
    codes, scale = by_hand(largest)
    assert (codes, scale) == ([7], 252)
    assert 6 * 2.0 ** (scale - 127) < largest


def test_what_is_no_number_is_seen() -> None:
    weight = torch.ones(2, 64)
    weight[0, 3], weight[1, 40] = math.nan, -math.inf
    codes, scale, lost = mxfp4.encode(weight)
    plain_codes, plain_scale = mxfp4_reference.encode(weight)
    assert same(codes, plain_codes)
    assert same(scale, plain_scale)
    assert not math.isfinite(lost[1])


def test_int4_of_the_same_size_has_a_third_less_error() -> None:
    """What help, notes and docs/formats.md say; and the search takes off 4%."""
    weight = gaussian(512, 4096)
    float4, int4 = (codec.measured(weight)[1].rel_error for codec in (Float4Group(), RoundToNearest(4, 64)))
    assert float4 <= 0.0126
    assert 0.64 <= int4 / float4 <= 0.68
    spec = TensorSpec((512, 4096), "BF16")
    assert Float4Group().bits_per_weight(spec) == RoundToNearest(4, 64).bits_per_weight(spec) == 4.25


def decoded(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """f64 [N, K] from the tables of the OCP specification and the order of compressed-tensors."""
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    out = np.zeros((packed.shape[0], 2 * packed.shape[1]))
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            byte = int(packed[row, column // 2])
            nibble = byte // 16 if column % 2 else byte % 16
            value = magnitudes[nibble % 8] * (-1 if nibble >= 8 else 1)
            out[row, column] = value * 2.0 ** (int(scale[row, column // 32]) - 127)
    return out


def stored(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys() if ".weight_" in name}  # noqa: SIM118


def test_the_files_hold_what_the_specification_says(tmp_path: Path) -> None:
    source = random_model(tmp_path / "source", layouts.PT, "moe", **WIDTHS["moe"])
    invoke("mxfp4", source, tmp_path / "out", "--experts-only", "-q")
    invoke("verify", tmp_path / "out", "--against", source, "--full")
    found, plain = stored(tmp_path / "out"), tensors(dequantized(tmp_path / "out", tmp_path / "plain"))
    modules = sorted({name.rpartition(".")[0] for name in found})
    assert modules
    assert {name.rpartition(".")[2] for name in found} == {"weight_packed", "weight_scale"}
    for module in modules[:: len(modules) // 3]:
        packed, scale = found[f"{module}.weight_packed"], found[f"{module}.weight_scale"]
        assert (packed.dtype, scale.dtype) == (np.uint8, np.uint8)
        values = decoded(packed, scale)
        assert np.array_equal(values, plain[f"{module}.weight"].double().numpy())
        original = tensors(source)[f"{module}.weight"].double().numpy()
        assert 0 < ((values - original) ** 2).sum() / (original**2).sum() < 0.02
    (group,) = config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["format"] == "mxfp4-pack-quantized"
    assert group["weights"] == {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
        "scale_dtype": "torch.uint8",
    }  # fmt: skip
    assert "input_activations" not in group
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "mxfp4, group 32" in {tensor["codec"] for tensor in report["tensors"]}
    assert "mxfp4" in invoke("inspect", tmp_path / "out")


def test_compressed_tensors_reads_a_weight_the_same() -> None:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    from ernie_quant.runtimes import _float4, vllm

    encoded = Float4Group().encode(gaussian(64, 256))
    packed = vllm.pack("m.weight", Float4Group(), encoded)
    scheme = QuantizationScheme(targets=["Linear"], weights=_float4.MX)
    state = {name.removeprefix("m."): tensor for name, tensor in packed.items()}
    found = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(found.bfloat16(), Float4Group().decode(encoded))


def test_widths_that_32_does_not_divide_are_refused_by_name() -> None:
    assert Float4Group().problem(TensorSpec((64, 48), "BF16")) == (
        "groups of 32 do not divide 48 inputs; int4 or int8 per channel would"
    )


def test_fastdeploy_has_no_form_of_it() -> None:
    with pytest.raises(PlanError, match="mxfp4 is not stored for fastdeploy; it is for vllm, transformers"):
        built_in.make("mxfp4", "fastdeploy")


def test_the_plan_says_what_it_is_for(tmp_path: Path) -> None:
    said = invoke("mxfp4", GOLDEN / "moe/pt", tmp_path / "out", "--dry-run", "--json")
    assert "mxfp4 is for Blackwell" in said
    assert "wint4 --group-size 64 has a third less error" in said
