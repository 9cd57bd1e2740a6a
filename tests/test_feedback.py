"""What codecs do with statistics of inputs: the loss e H e^T of each row falls, and rows are encoded each by itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.hessians import correlated
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_quant import codecs
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ErnieQuantError
from ernie_quant.kernels import curvature

BASES = [
    RoundToNearest(4, 64), RoundToNearest(4, CHANNEL), RoundToNearest(4, CHANNEL, "absmax"), RoundToNearest(4, 16),
    RoundToNearest(8, 128), RoundToNearest(2, 64), RoundToNearest(2, 64, full_range=False),
    RoundToNearest(4, CHANNEL, full_range=False), RoundToNearest(4, 64, "absmax", full_range=False), ConvolutionalCode(),
]  # fmt: skip
WIDTH = 256


def gaussian(rows: int, columns: int = WIDTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16()


def encoder(codec: codecs.Codec, hessian: torch.Tensor) -> codecs.Encoder:
    made = codec.prepare(TensorSpec((64, len(hessian)), "BF16"), {"hessian": hessian})
    assert made is not None
    return made


def losses(codec: codecs.Codec, encoded: dict[str, torch.Tensor], weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """e H e^T of each row, H damped as the codec does."""
    error = codec.decode(encoded).double() - weight.double()
    return ((error @ curvature.damped(hessian, codec.damping).double()) * error).sum(1)  # type: ignore[attr-defined]


@pytest.fixture(params=BASES, ids=lambda codec: codec.describe())
def base(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_feedback_loses_less_than_rounding_and_descent_less_again(base: Any) -> None:
    hessian, weight = correlated(WIDTH, dead=(3, 70, 71)), gaussian(150)
    nearest = losses(base, base.encode(weight), weight, hessian)
    begun = losses(base, encoder(replace(base, method="feedback"), hessian).encode(weight), weight, hessian)
    assert begun.sum() < 0.9 * nearest.sum()
    for passes in (1, 2):
        codec = replace(base, method="descent", passes=passes)
        ended = losses(base, encoder(codec, hessian).encode(weight), weight, hessian)
        assert (ended <= begun * (1 + 1e-5)).all()  # each row by itself
        assert ended.sum() < 0.995 * begun.sum()
        begun = ended


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-90, 90), damping=st.sampled_from([0.01, 0.3, 1.0]))
def test_any_inputs_and_magnitudes(seed: int, exponent: int, damping: float) -> None:
    hessian, weight = correlated(128, seed) * 1e6, (gaussian(9, 128, seed).float() * 2.0**exponent).bfloat16()
    for base in (RoundToNearest(4, 64, damping=damping), ConvolutionalCode(damping=damping)):
        begun = losses(base, encoder(replace(base, method="feedback"), hessian).encode(weight), weight, hessian)
        ended = losses(base, encoder(replace(base, method="descent"), hessian).encode(weight), weight, hessian)
        assert (ended <= begun * (1 + 1e-5)).all()
        assert begun.sum() <= losses(base, base.encode(weight), weight, hessian).sum()


def test_magnitudes_that_are_powers_of_two_have_the_same_codes(base: Any) -> None:
    made = encoder(replace(base, method="descent"), correlated(WIDTH))
    codes = made.encode(gaussian(8))["codes"]
    assert torch.equal(made.encode(gaussian(8).float() * 2.0**70)["codes"], codes)
    assert torch.equal(made.encode(gaussian(8).float() * 2.0**-70)["codes"], codes)


def test_slabs_of_rows_and_threads_encode_as_the_whole_does(base: Any) -> None:
    made, weight = encoder(replace(base, method="descent"), correlated(WIDTH)), gaussian(300)
    whole = made.encode(weight)
    with ThreadPoolExecutor(3) as pool:
        slabs = list(pool.map(made.encode, weight.split([1, 7, 128, 100, 64])))
    assert whole.keys() == base.specs(TensorSpec((300, WIDTH), "BF16")).keys()
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([slab[name] for slab in slabs]), tensor), name
    assert made.once == {}


@pytest.mark.parametrize("group", [16, 64, CHANNEL])
def test_with_unrelated_inputs_feedback_is_rounding_at_its_scales(group: int | str) -> None:
    codec, weight = RoundToNearest(4, group, method="feedback"), gaussian(20).float() * 1.001  # nothing lies between two codes
    encoded = encoder(codec, torch.eye(WIDTH)).encode(weight)
    assert torch.equal(encoded["codes"], codec.recode(weight, encoded)["codes"])
    if group == CHANNEL:
        assert torch.equal(encoded["codes"], codec.encode(weight)["codes"])


def test_with_unrelated_inputs_the_bytes_are_the_nearest() -> None:
    codec, weight = ConvolutionalCode(method="feedback"), gaussian(20)
    encoded = encoder(codec, torch.eye(WIDTH)).encode(weight)
    nearest = codec.decode(codec.recode(weight, encoded)).double() - weight.double()
    error = codec.decode(encoded).double() - weight.double()
    assert error.square().sum() < 1.0005 * nearest.square().sum()  # q is rounded to bf16, what it is chosen by is not


def test_inputs_that_nobody_uses_are_rounded_and_change_nothing_else() -> None:
    dead, codec = [0, 5, 100], RoundToNearest(4, CHANNEL, "absmax", method="feedback")
    made, weight = encoder(codec, correlated(WIDTH, dead=tuple(dead))), gaussian(20).float()
    weight[:, 9] = 0.1  # the largest of all rows: scales stay
    other = weight.clone()
    other[:, dead] *= 0.5
    encoded, again, rounded = made.encode(weight), made.encode(other), codec.encode(weight)
    assert torch.equal(encoded["codes"][:, dead], rounded["codes"][:, dead])
    live = [j for j in range(WIDTH) if j not in dead]
    assert torch.equal(again["codes"][:, live], encoded["codes"][:, live])
    assert not torch.equal(rounded["codes"][:, live], encoded["codes"][:, live])


def test_a_layer_without_inputs_is_rounded() -> None:
    codec, weight = RoundToNearest(4, CHANNEL, method="feedback"), gaussian(20)
    encoded = encoder(codec, torch.zeros(WIDTH, WIDTH)).encode(weight)
    assert torch.equal(encoded["codes"], codec.encode(weight)["codes"])


def test_rows_that_cannot_be_encoded_are_as_without_statistics(base: Any) -> None:
    weight = gaussian(6).float()
    weight[1], weight[2, 7], weight[3] = 0, float("nan"), weight[3] * 1e-35
    whole, free = encoder(replace(base, method="descent"), correlated(WIDTH)).encode(weight), base.encode(weight)
    alone = encoder(replace(base, method="descent"), correlated(WIDTH)).encode(weight[[0, 4, 5]])
    for name in free:
        assert torch.equal(whole[name][1:4].view(torch.uint8), free[name][1:4].view(torch.uint8)), name
        assert torch.equal(whole[name][[0, 4, 5]], alone[name]), name


def test_statistics_of_other_inputs_are_refused() -> None:
    codec = RoundToNearest(4, 64, method="feedback")
    with pytest.raises(ErnieQuantError, match="128 x 128, and the weight has 256 inputs"):
        codec.prepare(TensorSpec((64, 256), "BF16"), {"hessian": torch.eye(128)})
    with pytest.raises(ErnieQuantError, match="not finite"):
        codec.prepare(TensorSpec((64, 256), "BF16"), {"hessian": torch.full((256, 256), float("inf"))})
    with pytest.raises(ErnieQuantError, match="not positive"):
        codec.prepare(TensorSpec((64, 256), "BF16"), {"hessian": torch.eye(256) - 2 * torch.eye(256).roll(1, 0)})


@pytest.mark.parametrize(
    "options", [{"method": "gptq"}, {"damping": 0}, {"damping": "0.3"}, {"damping": float("nan")}, {"passes": 0}, {"passes": 1.5}]
)
@pytest.mark.parametrize("codec", [RoundToNearest, ConvolutionalCode])
def test_options_that_make_no_sense_are_refused(codec: type, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        codec(**options)


def test_what_it_is_called() -> None:
    assert RoundToNearest(4, 64, method="feedback", passes=7).describe() == "int4, group 64, mse, feedback"
    assert ConvolutionalCode(method="descent", damping=0.5).describe() == "wint2 (CCQ), descent, damping 0.5"
    assert RoundToNearest(4, 64, method="descent", passes=3).describe() == "int4, group 64, mse, descent, passes 3"
    assert RoundToNearest(4, 64, method="descent").form == "int4, group 64"


def test_wint2_reaches_a_neuron_that_nearly_all_of_the_output_comes_from() -> None:
    """Layers of many models have one: its input is a thousand times as large for some tokens, and its weights are large too."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * 0.02
    weight[:, 70] = torch.randn(64).sign() * 0.6
    diagonal = torch.ones(128)
    diagonal[70] = 1e6
    hessian = torch.diag(diagonal)
    codec = ConvolutionalCode(method="descent")
    encoder = codec.prepare(TensorSpec((64, 128), "F32"), {"hessian": hessian})
    assert encoder is not None
    error = codec.decode(encoder.encode(weight)).float() - weight
    assert ((error @ hessian) * error).sum() < 0.01 * ((weight @ hessian) * weight).sum()
