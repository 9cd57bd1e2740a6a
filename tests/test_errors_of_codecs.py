"""Relative errors on Gaussian weights, each against the bound that the tool promises (docs/formats.md)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import CHANNEL, GROUP_RATIOS, RoundToNearest
from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.kernels import rtn


def error(codec, rows: int, columns: int) -> float:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    decoded = codec.decode(codec.encode(weight))
    return float((decoded.double() - weight.double()).square().sum() / weight.double().square().sum())


@pytest.mark.parametrize(
    ("codec", "columns", "bound"),
    [
        (RoundToNearest(4, 128, "absmax"), 4096, 0.0140),
        (RoundToNearest(4, 128), 4096, 0.0096),
        (RoundToNearest(4, CHANNEL, "absmax"), 8192, 0.0275),
        (RoundToNearest(4, CHANNEL), 8192, 0.0120),
        (RoundToNearest(8, CHANNEL), 8192, 1e-4),
        (RoundToNearest(8, CHANNEL, "absmax"), 8192, 1e-4),
        (Float8Block(), 4096, 7.5e-4),
        (Float4Group(), 4096, 0.0126),
        (NvFloat4(), 4096, 0.0067),
        (RoundToNearest(4, 32), 4096, 0.0069),
        (RoundToNearest(4, 64), 4096, 0.0083),
        (Weight4Float8(), 4096, 0.0105),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else str(value),
)
def test_error_on_gaussian_weights(codec, columns: int, bound: float) -> None:
    assert error(codec, 512, columns) <= bound


def test_signed_scales_have_eight_percent_less_error_than_positive_ones() -> None:
    """The same search with the largest |w| on code 7, which every positive scale must use."""
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    ratios = np.array(GROUP_RATIOS, np.float32)
    positive = rtn.decode(*rtn.encode(weight, 128, -8, 7, 7, ratios, 1, False)[:2])
    of_positive = float((positive.double() - weight.double()).square().sum() / weight.double().square().sum())
    assert 0.91 <= error(RoundToNearest(4, 128), 512, 4096) / of_positive <= 0.93


def test_absmax_puts_the_largest_weight_on_7() -> None:
    weight = torch.tensor([[0.7, -0.1, 0.34, -0.7] + [0.0] * 12], dtype=torch.bfloat16)
    encoded = RoundToNearest(4, 16, "absmax").encode(weight)
    assert encoded["codes"][0, :4].tolist() == [7, -1, 3, -7]
    assert encoded["scale"].tolist() == [[pytest.approx(0.1, rel=2**-8)]]


def test_a_searched_scale_may_be_negative_so_that_minus_8_takes_the_largest() -> None:
    weight = torch.tensor([[0.8] + [-0.1, 0.2] * 7 + [0.1]], dtype=torch.bfloat16)
    encoded = RoundToNearest(4, 16).encode(weight)
    assert encoded["codes"][0, 0] == -8
    assert encoded["scale"][0, 0] < 0


@pytest.mark.parametrize("options", [{"bits": 3}, {"group_size": 7}, {"group_size": "row"}, {"scale": "max"}])
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RoundToNearest(**options)
