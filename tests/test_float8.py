"""The compiled float8 against plain torch, to the bit, and what it says of its loss."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bits import SHUFFLED, every_bf16, gaussian, same

from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.kernels import fp8, fp8_reference
from ernie_quant.measure import squares


def odd() -> torch.Tensor:
    """f32 [384, 256] with blocks of zeros, below the least scale, of denormals of float8, and large ones."""
    weight = torch.randn(384, 256, generator=torch.Generator().manual_seed(0))
    weight[:128, :128] = 0
    weight[128:256, :128] *= 1e-37
    weight[256:, :128] *= torch.logspace(-12, 0, 128)
    weight[:128, 128:] *= 1e34
    weight[130, 200] = -0.0
    return weight


WEIGHTS = {
    "every bf16, alike in a block": lambda: every_bf16().reshape(512, 128),
    "every bf16, shuffled": lambda: every_bf16()[SHUFFLED].reshape(128, 512),
    "every bf16 up to 448": lambda: every_bf16().clamp(-448, 448).reshape(256, 256),
    "odd, f32": odd,
    "odd, bf16": lambda: odd().bfloat16(),
    "of a larger matrix": lambda: gaussian(384, 512)[128:, 128:256],
    "f16": lambda: torch.randn(128, 256, generator=torch.Generator().manual_seed(2)).half(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_is_the_plain_one(name: str) -> None:
    weight = WEIGHTS[name]()
    codes, scale, lost = fp8.encode(weight)
    plain_codes, plain_scale = fp8_reference.encode(weight)
    assert same(codes, plain_codes)
    assert same(scale, plain_scale)
    decoded = fp8.decode(codes, scale)
    assert lost == fp8_reference.lost(weight, decoded)
    difference = squares(weight, decoded)
    assert lost == (pytest.approx(difference.error, 1e-12), pytest.approx(difference.total, 1e-12), difference.largest)


def test_a_nan_is_a_nan_and_is_seen() -> None:
    weight = torch.ones(128, 256)
    weight[3, 4], weight[5, 6], weight[7, 200] = torch.nan, -torch.nan, torch.inf
    (codes, scale, lost), (plain_codes, plain_scale) = fp8.encode(weight), fp8_reference.encode(weight)
    assert same(codes, plain_codes)
    assert same(scale, plain_scale)
    assert scale.tolist() == [[1.0, math.inf]]
    assert not math.isfinite(lost[1])


def test_four_codes_by_hand() -> None:
    """The scale is 896 / 448 = 2: 2 is stored as 1, 2.1 as 1 (1.05 lies nearest to it), -3 as -1.5."""
    weight = torch.zeros(128, 128)
    weight[0, :4] = torch.tensor([896.0, 2.0, 2.1, -3.0])
    encoded, difference = Float8Block().measured(weight)
    assert encoded["scale"].tolist() == [[2.0]]
    assert encoded["codes"].view(torch.uint8)[0, :5].tolist() == [0x7E, 0x38, 0x38, 0xBC, 0]
    assert difference.error == pytest.approx(0.01, 1e-4)
    assert difference.largest == pytest.approx(0.1, 1e-4)


def test_an_empty_weight_is_nothing() -> None:
    codes, scale, lost = fp8.encode(torch.empty(0, 128, dtype=torch.bfloat16))
    assert (codes.shape, scale.shape, lost) == ((0, 128), (0, 1), (0.0, 0.0, 0.0))
