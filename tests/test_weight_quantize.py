"""FastDeploy's WINT4 and WINT8 against paddlepaddle's own `weight_quantize` (golden/weight_quantize)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.bits import gaussian, same
from helpers.paths import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.dtypes import dtype_name
from ernie_quant.kernels import rtn, rtn_reference
from ernie_quant.kernels.weight_quantize import ROWS, absmax_codes, pack, pack_reference, unpack, unpack_reference

FOLDER = GOLDEN / "weight_quantize"
FILES = json.loads((FOLDER / "meta.json").read_text())["files"]
BITS = pytest.mark.parametrize("bits", [4, 8])


def golden(name: str) -> tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits, inputs per scale, weight [out, in] (bf16 or fp16), packed codes as int8, scales [out, groups] in its dtype."""
    bits, dtype, _ = name.removeprefix("int").split("_")
    stored = np.load(FOLDER / f"{name}.npz")
    weight = torch.from_numpy(stored["w"]).view(getattr(torch, dtype)).T.contiguous()
    scale = torch.from_numpy(stored["scale"]).to(weight.dtype).reshape(-1, len(weight)).T
    assert torch.equal(scale.float(), torch.from_numpy(stored["scale"]).reshape(-1, len(weight)).T)
    return int(bits), weight.shape[1] // scale.shape[1], weight, torch.from_numpy(stored["q"]), scale


def random_codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    high = 2 ** (bits - 1)
    return torch.from_numpy(np.random.default_rng(seed).integers(-high, high, (rows, columns)).astype(np.int8))


@pytest.mark.parametrize("name", FILES)
def test_packed_codes_and_scales_are_those_of_paddle(name: str) -> None:
    bits, group, weight, packed, scale = golden(name)
    assert (weight.reshape(-1, group) == 0).all(1).any(), "a row of zeros is what this file is for"
    codes, found = absmax_codes(weight.reshape(-1, group), bits, weight.dtype)
    codes = codes.reshape(weight.shape)
    assert same(found.reshape(scale.shape), scale)
    assert same(pack(codes, bits), packed)
    assert same(pack_reference(codes, bits), packed)


@pytest.mark.parametrize("name", [name for name in FILES if "bfloat16" in name])
def test_the_codec_gives_what_paddle_stores(name: str) -> None:
    bits, group, weight, packed, scale = golden(name)
    size = CHANNEL if group == weight.shape[1] else group
    encoded = RoundToNearest(bits, size, "absmax", full_range=False).encode(weight)
    assert same(encoded["scale"], scale)
    assert same(pack(encoded["codes"], bits), packed)


@pytest.mark.parametrize("name", FILES)
def test_unpacked_goldens_are_the_weights_within_half_a_step(name: str) -> None:
    bits, group, weight, packed, scale = golden(name)
    codes = unpack(packed, bits)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    step = scale.double().repeat_interleave(group, 1)
    # the largest weight may lie past the last code by what rounding the scale took from it: high * 2**-8 (or 2**-11)
    bound = torch.maximum(step / 2, weight.double().abs() * torch.finfo(weight.dtype).eps / 2)
    assert ((codes.double() * step - weight.double()).abs() <= bound * (1 + 1e-6)).all()


def test_a_row_of_zeros() -> None:
    """0 / 0: paddle's float32 minimum keeps 127, its int4 conversion gives the lowest integer."""
    zeros = torch.zeros(4, 64, dtype=torch.bfloat16)
    for bits, code in [(4, -7), (8, 127)]:
        encoded = RoundToNearest(bits, CHANNEL, "absmax", full_range=False).encode(zeros)
        assert encoded["scale"].tolist() == [[0.0]] * 4
        assert encoded["codes"].unique().tolist() == [code]
        assert not RoundToNearest().decode(encoded).any()
        searched = RoundToNearest(bits, CHANNEL, full_range=False).encode(zeros)
        assert searched["scale"].tolist() == [[1.0]] * 4
        assert not searched["codes"].any()


def test_halves_go_away_from_zero_and_what_is_just_below_a_half_does_not() -> None:
    row = torch.tensor([[7.0, -7.0, 0.5, -0.5, 1.5, -2.5, 0.49999997, -0.49999997]])
    codes, scale = absmax_codes(row, 4, torch.bfloat16)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[7, -7, 1, -1, 2, -3, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BITS
def test_a_tiny_row_has_no_scale_of_zero(bits: int, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    row = torch.tensor([[smallest, -smallest, 0, 3 * smallest]], dtype=dtype)
    codes, scale = absmax_codes(row, bits, dtype)
    assert scale.item() == smallest
    assert codes.tolist() == [[1, -1, 0, 3]]


def test_8_bits_by_hand() -> None:
    """Inputs 0 and 8, 1 and 9, ... side by side, plus 128; two rows take turns in tiles of 64."""
    codes = torch.arange(4 * 128, dtype=torch.int32).reshape(4, 128)
    codes = ((codes % 128) - (codes // 128) * 16 - 64).to(torch.int8)
    packed = pack(codes, 8).view(torch.uint8).int() - 128
    assert packed[0, :6].tolist() == [-64, -56, -63, -55, -62, -54]
    assert packed[0, 16:18].tolist() == [-48, -40]
    assert packed[0, 64:66].tolist() == [-80, -72], "row 1, tile 0"
    assert packed[1, :2].tolist() == [0, 8], "row 0, tile 1"
    assert packed[2, :2].tolist() == [-96, -88], "row 2, tile 0"


def test_4_bits_by_hand() -> None:
    """Inputs 0 and 8 share byte 0, 16 and 24 byte 1; four rows take turns in tiles of 64, so 32 bytes each."""
    codes = torch.zeros(4, 64, dtype=torch.int8)
    codes[0, 0], codes[0, 8], codes[0, 16], codes[0, 24], codes[0, 1] = -7, -6, -5, -4, 7
    codes[1, 0], codes[3, 63] = -3, 7
    packed = pack(codes, 4).view(torch.uint8)
    assert packed.shape == (2, 64)
    assert bytes(packed[0, :3].tolist()).hex() == "21438f"
    assert packed[0, 32] == 0x85
    assert packed[1, 63] == 0xF8


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
def test_packing_has_an_inverse_and_is_the_plain_one(bits: int, rows: int, tiles: int, seed: int) -> None:
    codes = random_codes(bits, rows * ROWS, tiles * 64, seed)
    packed = pack(codes, bits)
    assert packed.shape == (len(codes) * bits // 8, codes.shape[1])
    assert same(packed, pack_reference(codes, bits))
    assert same(unpack(packed, bits), codes)
    assert same(unpack_reference(packed, bits), codes)
    assert same(pack(codes.T.contiguous().T, bits), packed)


@BITS
def test_slabs_of_rows_pack_as_the_whole_does(bits: int) -> None:
    codes = random_codes(bits, 4 * ROWS, 192)
    whole = pack(codes, bits)
    for rows in (ROWS, 2 * ROWS):
        assert same(torch.cat([pack(slab, bits) for slab in codes.split(rows)]), whole)
        assert same(torch.cat([unpack(slab, bits) for slab in whole.split(rows * bits // 8)]), codes)
    smallest = next(n for n in (1, 2, 4) if same(packed_in_slabs(codes, bits, n), whole))
    assert smallest == {4: ROWS, 8: 2}[bits]


def packed_in_slabs(codes: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Rows n at a time, each slab filled up with zeros to ROWS; the packed rows that are its own."""
    slabs = [torch.cat([slab, slab.new_zeros(ROWS - rows, slab.shape[1])]) for slab in codes.split(rows)]
    return torch.cat([pack(slab, bits)[: max(rows * bits // 8, 1)] for slab in slabs])


@pytest.mark.parametrize("shape", [(2, 64), (6, 64), (4, 32), (4, 96)])
@BITS
def test_shapes_that_do_not_fit_are_our_mistake(bits: int, shape: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match=str(shape[0])):
        pack(torch.zeros(shape, dtype=torch.int8), bits)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0131), (8, 8.2e-5)])
def test_error_of_long_gaussian_channels(bits: int, bound: float) -> None:
    weight = gaussian(256, 8192)
    codec = RoundToNearest(bits, CHANNEL, full_range=False)
    encoded = codec.encode(weight)
    high = 2 ** (bits - 1) - 1
    assert encoded["codes"].min() == -high
    assert encoded["codes"].max() == high
    assert (encoded["scale"] > 0).all()
    decoded = codec.decode(encoded)
    assert (decoded.double() - weight.double()).square().sum() <= bound * weight.double().square().sum()


@pytest.mark.parametrize(
    ("bits", "group", "scale"), [(4, CHANNEL, "mse"), (8, CHANNEL, "mse"), (4, 64, "absmax"), (2, 64, "mse")]
)
def test_the_promises_of_a_codec_hold_without_the_lowest_code(bits: int, group: int | str, scale: str) -> None:
    codec, weight = RoundToNearest(bits, group, scale, full_range=False), gaussian(64, 384)
    whole, slabs = codec.encode(weight), [codec.encode(slab) for slab in weight.split(16)]
    for field, spec in codec.specs(TensorSpec((64, 384), "BF16")).items():
        assert TensorSpec(tuple(whole[field].shape), dtype_name(whole[field].dtype)) == spec
        assert same(torch.cat([slab[field] for slab in slabs]), whole[field])
        assert same(codec.encode(weight.float())[field], whole[field])
    once = codec.decode(whole)
    twice = codec.decode(codec.encode(once))
    assert (twice.double() - once.double()).square().sum() <= 1e-3 * once.double().square().sum()


@pytest.mark.parametrize(("bits", "low"), [(2, -1), (4, -7), (8, -127)])
def test_the_search_without_the_lowest_code_is_the_plain_search(bits: int, low: int) -> None:
    weight = gaussian(67, 256)
    ratios = np.array([1.0, 0.9, 0.8], np.float32)
    codes, scale, _ = rtn.encode(weight, 256, low, -low, -low, ratios, 2, False)
    plain_codes, plain_scale = rtn_reference.encode(weight, 256, low, -low, -low, ratios, 2, False)
    assert same(codes, plain_codes)
    assert same(scale, plain_scale)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from(["mse", "absmax"]), st.integers(-36, 36), st.booleans(), st.integers(0, 2**31))
def test_any_magnitude_gives_finite_scales_and_a_bounded_error(
    bits: int, scale: str, exponent: int, outlier: bool, seed: int
) -> None:
    weight = (gaussian(4, 64, seed).float() * 10.0**exponent).bfloat16()
    weight[0], weight[1] = 0, weight[1, 0]
    if outlier:
        weight[-1, 7] *= 1000
    codec = RoundToNearest(bits, CHANNEL, scale, full_range=False)
    encoded = codec.encode(weight)
    assert encoded["codes"].abs().max() <= 2 ** (bits - 1) - 1
    assert encoded["scale"].isfinite().all()
    assert ((encoded["scale"] > 0) | (weight == 0).all(1, keepdim=True)).all()
    error = (weight.double() - codec.decode(encoded).double()).square().sum(1)
    assert (error <= 0.1 * weight.double().square().sum(1) + 1e-60).all()


def test_it_says_what_it_is() -> None:
    assert RoundToNearest(4, CHANNEL, full_range=False).describe() == "int4 (-7 to 7), per channel, mse"
    assert RoundToNearest(8, 64, "absmax", full_range=False).describe() == "int8 (-127 to 127), group 64, absmax"
    with pytest.raises(ValueError, match="full_range"):
        RoundToNearest(full_range=1)  # type: ignore[arg-type]
