"""Every codec keeps every promise of `Codec`; a new file is under test at once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.hessians import once_of, statistics_of

from ernie_quant import codecs, plugins, runtimes
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.dtypes import dtype_name
from ernie_quant.errors import CheckpointError, ErnieQuantError
from ernie_quant.measure import checked, squares
from ernie_quant.names import ATTENTION, EXPERT, IN, MLP
from ernie_quant.runtimes import fastdeploy
from ernie_quant.weights.layouts import PADDLE

# the forms of FastDeploy's container stand beside every codec's own examples
EXAMPLES = [example for module in plugins.modules(codecs) for example in module.EXAMPLES] + [fastdeploy.WINT4, fastdeploy.WINT8]
NARROW, WIDE = TensorSpec((256, 384), "BF16"), TensorSpec((256, 768), "BF16")


@pytest.fixture(params=EXAMPLES, ids=lambda codec: codec.describe())
def codec(request: pytest.FixtureRequest) -> codecs.Codec:
    return request.param


@pytest.fixture
def spec(request: pytest.FixtureRequest) -> TensorSpec:
    """The narrower one, where the codec takes it."""
    under_test = request.getfixturevalue("codec" if "codec" in request.fixturenames else "stored")
    return spec_for(under_test if "codec" in request.fixturenames else under_test[1])


def spec_for(codec: codecs.Codec) -> TensorSpec:
    return NARROW if codec.problem(NARROW) is None else WIDE


@pytest.fixture
def weight(spec: TensorSpec) -> torch.Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(3)).mul(0.02).bfloat16()


def test_it_is_frozen_and_says_what_it_is(codec: codecs.Codec) -> None:
    assert dataclasses.is_dataclass(codec)
    assert type(codec).__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert codec.describe()
    assert codec.problem(spec_for(codec)) is None


def test_fields_have_the_shapes_that_the_plan_knew(codec: codecs.Codec, weight: torch.Tensor, spec: TensorSpec) -> None:
    whole = once_of(codec, spec) | codec.encode(weight)
    fields = {name: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for name, t in whole.items()}
    assert fields == codec.specs(spec)


def test_what_it_needs_is_what_the_weight_does_not_show(codec: codecs.Codec, weight: torch.Tensor, spec: TensorSpec) -> None:
    """A field is made of rows or of statistics; without one that is needed there is an error that names it."""
    without = codec.specs(spec).keys() - codec.encode(weight).keys()
    assert without == once_of(codec, spec).keys()
    assert bool(without) == bool(codec.needs)
    for name in codec.needs:
        statistics = statistics_of(codec, spec)
        del statistics[name]
        with pytest.raises(ErnieQuantError, match="is not among the statistics"):
            codec.prepare(spec, statistics)


def test_decoding_gives_the_weight_within_the_noise_of_its_bits(
    codec: codecs.Codec, weight: torch.Tensor, spec: TensorSpec
) -> None:
    decoded = codec.decode(codec.encode(weight))
    assert decoded.shape == weight.shape
    error = (decoded.double() - weight.double()).square().sum() / weight.double().square().sum()
    assert error <= max(4.0 ** (1.3 - codec.bits_per_weight(spec)), 1e-3)  # a float8 has 3 bits of mantissa


def test_slabs_of_rows_encode_as_the_whole_does(codec: codecs.Codec, weight: torch.Tensor) -> None:
    whole = codec.encode(weight)
    slabs = [codec.encode(weight[:128]), codec.encode(weight[128:])]
    for name, tensor in whole.items():
        joined = torch.cat([slab[name] for slab in slabs])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("magnitude", [0.0, 1e-36, 1e-20, 0.02, 1e30], ids=lambda m: f"{m:g}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_what_is_measured_while_encoding_is_what_decoding_shows(
    codec: codecs.Codec, spec: TensorSpec, dtype: torch.dtype, magnitude: float
) -> None:
    """And the codes are the same. Heavy tails and odd rows, so that clipping, zeros and roundings of scales come up."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(spec.shape, generator=generator).double().pow(3) * magnitude
    weight[3] = 0
    weight[5, : spec.shape[1] // 2] = 0
    weight = weight.to(dtype)
    encoded, found = codec.measured(weight)
    for name, field in codec.encode(weight).items():
        assert torch.equal(field.view(torch.uint8), encoded[name].view(torch.uint8))
    expected = squares(weight, codec.decode(encoded))
    assert found.largest == expected.largest
    assert found.error == pytest.approx(expected.error, rel=1e-11, abs=0)
    assert found.total == pytest.approx(expected.total, rel=1e-11, abs=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**121])
def test_what_cannot_be_quantized_is_refused_from_what_was_measured(
    codec: codecs.Codec, weight: torch.Tensor, bad: float
) -> None:
    weight[17, 33] = bad
    with pytest.raises(CheckpointError, match="w: holds"):
        checked("w", weight, codec.measured(weight)[1])


def test_statistics_of_inputs_change_codes_and_nothing_else(codec: codecs.Codec, weight: torch.Tensor, spec: TensorSpec) -> None:
    """What is prepared with them, if anything, gives the same fields, for all rows and for slabs; without them nothing is."""
    assert codec.prepare(spec, {}) is None
    encoder = codec.prepare(spec, statistics_of(codec, spec))
    if encoder is None:
        return
    whole = encoder.once | encoder.encode(weight)
    assert {name: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for name, t in whole.items()} == codec.specs(spec)
    slabs = [encoder.once | encoder.encode(slab) for slab in (weight[:100], weight[100:])]
    assert all(torch.equal(torch.cat([slab[name] for slab in slabs]), whole[name]) for name in whole if name not in encoder.once)
    again = codec.recode(codec.decode(whole), whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    error = (codec.decode(whole).double() - weight.double()).square().sum() / weight.double().square().sum()
    assert error <= 2 * max(4.0 ** (1.3 - codec.bits_per_weight(spec)), 1e-3)  # feedback moves the weight for its output


def test_codes_are_a_fixed_point(codec: codecs.Codec, weight: torch.Tensor) -> None:
    """What was decoded once decodes to itself when it is encoded again, up to the rounding of its scale.

    A search over scales need not find the very ones again: it may add a twentieth of the first error.
    """
    once = codec.decode(codec.encode(weight))
    twice = codec.decode(codec.encode(once))
    first = (once.double() - weight.double()).square().sum() / weight.double().square().sum()
    assert (twice.double() - once.double()).square().sum() <= max(1e-3, first / 20) * once.double().square().sum()


@pytest.mark.parametrize("magnitude", [0.0, 1e-36, 1e-30, 0.02, 1e30], ids=lambda m: f"{m:g}")
def test_a_decoded_weight_has_the_same_codes_at_the_same_scales(codec: codecs.Codec, magnitude: float, spec: TensorSpec) -> None:
    noise = torch.randn(spec.shape, generator=torch.Generator().manual_seed(4))
    weight = (noise * noise.abs()).mul(magnitude).bfloat16()  # heavier tails than those of a Gaussian
    weight[5] = 0
    encoded = codec.encode(weight)
    again = codec.recode(codec.decode(encoded), encoded)
    assert again.keys() == encoded.keys()
    assert [n for n in encoded if not torch.equal(again[n].view(torch.uint8), encoded[n].view(torch.uint8))] == []


def test_other_codes_mean_another_version(
    codec: codecs.Codec, weight: torch.Tensor, golden_value: Callable[[str, Any], Any]
) -> None:
    """A codec whose fields change without a new `version` would let a begun result go on with other bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.encode(weight).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    key = f"codec {codecs.name_of(codec)} version {codec.version}: {codec.describe()}"
    assert golden_value(key, digest.hexdigest()) == digest.hexdigest(), "raise `version` in the codec's file"


NAMES = ("layers.1.mlp.down_proj.weight", "layers.1.mlp.up_gate_proj.weight", "layers.1.self_attn.qkv_proj.weight")


def weight_name(runtime: ModuleType, codec: codecs.Codec) -> str:
    """A weight that the runtime stores so, as its layout names it; empty where a file of it holds none."""
    if not isinstance(codec, runtime.CODECS):
        return ""
    root = "ernie" if PADDLE.name == runtime.LAYOUT else "model"
    linears = [
        runtimes.Linear(f"{root}.{name}", spec_for(codec), role, codec, IN) for name in NAMES for role in (EXPERT, MLP, ATTENTION)
    ]
    return next((linear.name for linear in linears if not runtime.problems([linear])), "")


@pytest.fixture(
    params=[(runtime, codec) for runtime in plugins.modules(runtimes) for codec in EXAMPLES if weight_name(runtime, codec)],
    ids=lambda pair: f"{pair[0].__name__.rpartition('.')[2]}: {pair[1].describe()}",
)
def stored(request: pytest.FixtureRequest) -> tuple[ModuleType, codecs.Codec]:
    """Every runtime with every codec that it can store."""
    return request.param


def test_bits_per_weight_counts_every_stored_bit(stored: tuple[ModuleType, codecs.Codec], spec: TensorSpec) -> None:
    runtime, codec = stored
    parts = runtime.parts(weight_name(runtime, codec), codec, spec)
    nbytes = sum(part.spec.nbytes for name, part in parts.items() if not name.endswith("weight_shape"))
    # in PT files the three scales of a WINT2 output are one float32 tensor, one of them with 16 bits that say nothing
    idle = 16 * spec.shape[0] if isinstance(codec, ConvolutionalCode) and runtime.LAYOUT == "pt" else 0
    assert 8 * nbytes - idle == codec.bits_per_weight(spec) * spec.numel


def test_a_runtime_gives_back_what_it_packed(
    stored: tuple[ModuleType, codecs.Codec], weight: torch.Tensor, spec: TensorSpec
) -> None:
    (runtime, codec), name = stored, weight_name(*stored)
    once = once_of(codec, spec)
    encoded = once | codec.encode(weight)
    parts = runtime.pack(name, codec, encoded) | runtime.constants(name, codec, spec, once)
    specs = {n: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for n, t in parts.items()}
    assert specs == {n: part.spec.held for n, part in runtime.parts(name, codec, spec).items()}
    assert {runtime.weight_of(n)[0] for n in parts} == {name}
    back = runtime.unpack(name, codec, parts)
    assert all(torch.equal(back[field].view(torch.uint8), encoded[field].view(torch.uint8)) for field in encoded)


def test_float32_weights_are_taken_too(codec: codecs.Codec, weight: torch.Tensor) -> None:
    same = codec.decode(codec.encode(weight.float()))
    assert torch.equal(same.bfloat16(), codec.decode(codec.encode(weight)).bfloat16())
