"""Kernels against their plain torch versions, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.bits import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.kernels import difference, packing, rtn, rtn_reference

SEARCH = (np.array([1.0, 0.92, 0.84, 0.76, 0.68], np.float32), 1, True)
ABSMAX = (np.array([1.0], np.float32), 0, False)


@pytest.mark.parametrize("search", [SEARCH, ABSMAX], ids=["mse", "absmax"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 256), (2, 64)])
def test_the_search_is_the_plain_search(bits: int, group: int, search) -> None:
    high = 2 ** (bits - 1) - 1
    args = (group, -high - 1, high, high + search[2], *search)
    for weight in (gaussian(67, 512), gaussian(67, 512).float() * 1.001):  # 67 rows: a whole tile and a rest
        codes, scale, _ = rtn.encode(weight, *args)
        plain_codes, plain_scale = rtn_reference.encode(weight, *args)
        assert torch.equal(codes, plain_codes)
        assert torch.equal(scale.view(torch.uint16), plain_scale.view(torch.uint16))
        assert torch.equal(rtn.decode(codes, scale), rtn_reference.decode(codes, scale))


def test_a_whole_channel_is_a_group() -> None:
    weight = gaussian(33, 2048)
    args = (2048, -8, 7, 8, *SEARCH)
    assert all(torch.equal(a, b) for a, b in zip(rtn.encode(weight, *args)[:2], rtn_reference.encode(weight, *args), strict=True))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-36, 36), rows=st.integers(1, 5), outlier=st.booleans())
def test_any_magnitude_gives_finite_scales_and_a_bounded_error(seed: int, exponent: int, rows: int, outlier: bool) -> None:
    weight = (gaussian(rows, 128, seed, 1.0).float() * 10.0**exponent).bfloat16()
    weight[0] = 0
    if outlier:
        weight[-1, 7] *= 1000
    encoded = RoundToNearest(4, 32).encode(weight)
    plain = rtn_reference.encode(weight, 32, -8, 7, 8, *SEARCH)
    assert torch.equal(encoded["codes"], plain[0])
    assert encoded["scale"].isfinite().all()
    decoded = RoundToNearest(4, 32).decode(encoded)
    difference_ = (weight.double() - decoded.double()).square().sum(1)
    assert (difference_ <= 0.1 * weight.double().square().sum(1) + 1e-60).all()


def test_a_row_of_zeros_decodes_to_zeros() -> None:
    encoded = RoundToNearest(4, CHANNEL).encode(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert encoded["scale"].tolist() == [[1.0], [1.0]]
    assert not encoded["codes"].any()


def test_four_codes_by_hand() -> None:
    """-8, 7, 0, 1 become the nibbles 0, f, 8, 9, the first in the lowest bits."""
    assert packing.pack(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8), 4).tolist() == [[0x98F0]]
    assert packing.pack(torch.tensor([[-8, 7, 0, 1, 0, 0, 0, -1]], dtype=torch.int8), 4).tolist() == [[0x788898F0]]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_packing_has_an_inverse(bits: int, columns: int, rows: int, seed: int) -> None:
    high = 2 ** (bits - 1)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-high, high, (rows, columns)).astype(np.int8))
    packed = packing.pack(codes, bits)
    assert torch.equal(packed, packing.pack_reference(codes, bits))
    assert torch.equal(packing.unpack(packed, bits, columns), codes)


def test_packing_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 5)
    assert torch.equal(packing.pack(codes, 4), pack_to_int32(codes, 4))


def test_sums_by_hand() -> None:
    left, right = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[1.0, 0.0], [3.0, -1.0]])
    assert difference.squares(left, right) == (13.0, 30.0, 3.0)
    assert difference.squares(left.bfloat16(), right.bfloat16()) == (13.0, 30.0, 3.0)


def test_sums_are_those_of_plain_torch() -> None:
    weight = gaussian(40, 300)
    changed = (weight.float() * 1.01).bfloat16()
    assert difference.squares(weight, changed) == pytest.approx(difference.squares_reference(weight, changed), rel=1e-12)
