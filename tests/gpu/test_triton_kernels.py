"""Kernels for GPUs give the bits of the CPU's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.bits import same
from helpers.gpu import kernels_of_the_cpu

from ernie_quant import codecs, kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.ccq import CANDIDATES, ConvolutionalCode
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.q4_0 import CODEC as Q4_0
from ernie_quant.codecs.rtn import CHANNEL, SCALES, RoundToNearest
from ernie_quant.errors import CheckpointError, ErnieQuantError
from ernie_quant.kernels import difference, packing, weight_quantize
from ernie_quant.measure import compare

# numpy warns of 0 / 0 and of overflow where a kernel goes on with neither, and older interpreters make numbers of arrays
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")

INTEGERS = [
    pytest.param(RoundToNearest(bits, group, scale, full_range), marks=[pytest.mark.slow] if bits != 4 else [])
    for bits in (2, 4, 8)
    for group in (16, 48, CHANNEL)
    for scale in SCALES
    for full_range in (True, False)
]


def odd(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """f32 with rows of zeros, tiny, huge and heavy-tailed ones, an outlier, and a row that is zeros but for one number."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = noise * 0.02
    weight[0] = 0
    weight[1] *= 1e-36
    weight[2] *= 1e32
    weight[3] = noise[3] ** 3
    weight[4, 5] = 7.0
    weight[5] = 0
    weight[5, columns // 2] = -1e-3
    return weight


def encoded_twice(codec: codecs.Codec, weight: torch.Tensor, device: str) -> tuple[codecs.Encoded, codecs.Encoded]:
    """By the CPU's kernels, and by those of the device, which also say what was lost; NaN is not equal to itself."""
    with kernels_of_the_cpu():
        plain, lost = codec.measured(weight)
    encoded, found = codec.measured(weight.to(device))
    assert lost == found or not math.isfinite(lost.total + lost.error)
    return plain, encoded


def check(codec: codecs.Codec, weight: torch.Tensor, device: str) -> None:
    """All fields, what they decode to, the nearest codes at their scales, and what reports say of it."""
    plain, encoded = encoded_twice(codec, weight, device)
    assert [name for name in plain if not same(plain[name], encoded[name].cpu())] == []
    decoded = codec.decode(encoded)
    assert {tensor.device.type for tensor in (decoded, *encoded.values())} == {device}
    again, difference_ = codec.recode(weight.to(device), encoded), compare("w", weight.to(device), decoded)
    with kernels_of_the_cpu():
        assert same(codec.decode(plain), decoded.cpu())
        assert same(codec.recode(weight, plain)["codes"], again["codes"].cpu())
        assert compare("w", weight, codec.decode(plain)) == difference_


@pytest.mark.parametrize("codec", INTEGERS, ids=lambda codec: codec.describe())
def test_integers(codec: RoundToNearest, device: str) -> None:
    weight = odd(7, 48, seed=codec.bits)
    check(codec, weight.bfloat16() if codec.full_range else weight, device)


@pytest.mark.parametrize(("rows", "columns"), [(6, 1100), (6, 36), (67, 32)], ids=["long", "short", "several programs"])
def test_integers_of_other_shapes(rows: int, columns: int, device: str) -> None:
    check(RoundToNearest(4, CHANNEL, "mse" if rows > 6 else "absmax"), odd(rows, columns).bfloat16(), device)


@pytest.mark.parametrize("codec", [RoundToNearest(4, 16), RoundToNearest(8, CHANNEL, full_range=False), ConvolutionalCode(1)],
                         ids=lambda codec: codec.describe())  # fmt: skip
def test_a_row_with_a_nan_changes_no_other_and_is_refused_by_name(codec: codecs.Codec, device: str) -> None:
    weight = odd(16, 128)
    weight[7, 3], weight[8, 3] = torch.nan, torch.inf
    plain, encoded = encoded_twice(codec, weight, device)
    good = [row for row in range(16) if row not in (7, 8)]
    assert all(same(plain[name][good], encoded[name].cpu()[good]) for name in plain)
    with pytest.raises(CheckpointError, match=r"^up: holds NaN or infinity, which cannot be quantized$"):
        compare("up", weight.to(device), codec.decode(encoded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float8(dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    weight[:128, :128] = 0
    weight[128:, :128] *= 1e-37  # below the least scale
    weight[128:, 128:256] *= torch.logspace(-12, 0, 128)  # denormals of float8 too
    weight[:128, 256:] *= 1e34
    weight[130, 300] = -0.0
    check(Float8Block(), weight.to(dtype), device)


def test_float8_of_a_nan_is_a_nan(device: str) -> None:
    weight = torch.ones(128, 128)
    weight[3, 4], weight[5, 6] = torch.nan, -1.0
    plain, encoded = encoded_twice(Float8Block(), weight, device)
    assert same(plain["codes"], encoded["codes"].cpu())
    assert plain["scale"].tolist() == encoded["scale"].tolist() == [[1.0]]


def test_float8_has_all_codes(device: str) -> None:
    """Every float8 is its own nearest; a number between two goes to the even one."""
    codes = torch.tensor([c for c in range(256) if c % 128 < 127], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[:-1] + codes[1:]) / 2
    weight = torch.cat([codes, halves, torch.zeros(2 * 128 * 128 - len(codes) - len(halves))]).reshape(128, 256)
    scale = torch.ones(1, 2)
    found = kernels.of("fp8", weight.to(device)).codes(weight.to(device), scale.to(device)).cpu()
    assert same(found.flatten()[: len(codes)].float(), codes)
    with kernels_of_the_cpu():
        assert same(found, kernels.of("fp8", weight).codes(weight, scale))


@pytest.mark.parametrize("effort", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 16))])
def test_wint2(effort: int, device: str) -> None:
    rows, width = {1: (9, 192), 4: (7, 128), 16: (7, 128)}[effort]
    weight = odd(rows, width, effort)
    weight[6, :64] = 0
    check(ConvolutionalCode(effort), weight if effort == 4 else weight.bfloat16(), device)


@pytest.mark.slow
def test_wint2_in_several_programs(device: str) -> None:
    plain, found = encoded_twice(ConvolutionalCode(1), odd(7, 1216).bfloat16(), device)  # 133 groups
    assert all(same(plain[name], found[name].cpu()) for name in plain)


def test_wint2_takes_the_first_of_pairs_that_are_alike(device: str) -> None:
    weight = odd(7, 128).bfloat16()
    pairs = [CANDIDATES[3], CANDIDATES[3], CANDIDATES[0]]  # three: one lane is left over
    with kernels_of_the_cpu():
        plain = kernels.of("ccq", weight).encode(weight, pairs)
    found = kernels.of("ccq", weight.to(device)).encode(weight.to(device), pairs)
    assert all(same(plain[name], found[name].cpu()) for name in plain)


@pytest.mark.parametrize(("bits", "columns"), [(2, 100), (4, 1200), (4, 4101), (8, 77), (4, 1)])
def test_words(bits: int, columns: int, device: str) -> None:
    high = 2 ** (bits - 1)
    codes = torch.from_numpy(np.random.default_rng(bits).integers(-high, high, (3, columns)).astype(np.int8))
    words = kernels.of("packing", codes.to(device)).pack(codes.to(device), bits)
    assert same(words.cpu(), packing.pack(codes, bits))
    assert same(kernels.of("packing", words).unpack(words, bits, columns).cpu(), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_of_fastdeploy(bits: int, device: str) -> None:
    high = 2 ** (bits - 1)
    codes = torch.from_numpy(np.random.default_rng(bits).integers(-high, high, (12, 192)).astype(np.int8))
    packed = kernels.of("weight_quantize", codes.to(device)).pack(codes.to(device), bits)
    assert same(packed.cpu(), weight_quantize.pack(codes, bits))
    assert same(kernels.of("weight_quantize", packed).unpack(packed, bits).cpu(), codes)


@pytest.mark.parametrize("shape", [(1, 5), (37, 70), (64, 129)], ids=str)
def test_sums(shape: tuple[int, int], device: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e3
    for left, right in ((weight, weight * 1.01), (weight.bfloat16(), weight), (weight, weight.bfloat16())):
        found = kernels.of("difference", left.to(device)).squares(left.to(device), right.to(device))
        assert found == difference.squares(left, right)


def test_an_empty_weight_is_nothing(device: str) -> None:
    encoded = RoundToNearest(4, 16).encode(torch.empty((0, 32), dtype=torch.bfloat16, device=device))
    assert (encoded["codes"].shape, encoded["scale"].shape) == ((0, 32), (0, 2))


# --- what a device has no kernels for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [Q4_0(), RoundToNearest(4, CHANNEL, method="descent"), ConvolutionalCode(1, method="feedback")],
                         ids=lambda codec: codec.describe())  # fmt: skip
def test_it_is_done_on_the_cpu(codec: codecs.Codec, device: str) -> None:
    weight = odd(8, 128).bfloat16()
    inputs = torch.randn(300, 128, generator=torch.Generator().manual_seed(3))
    statistics = {"hessian": inputs.T @ inputs / 300}
    with kernels_of_the_cpu():
        plain = codec.prepare(TensorSpec((8, 128), "BF16"), statistics).encode(weight)
    encoded = codec.prepare(TensorSpec((8, 128), "BF16"), statistics).encode(weight.to(device))
    assert all(same(plain[name], encoded[name].cpu()) for name in plain)
    assert {tensor.device.type for tensor in encoded.values()} == {device}


def test_a_device_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ErnieQuantError, match=r"^kernels rtn: there are none for the device meta; there are for cpu, cuda$"):
        kernels.of("rtn", torch.empty(1, device="meta"))


def test_tensors_are_moved_wherever_they_are() -> None:
    moved = kernels.moved((torch.ones(1), {"a": [torch.ones(2), 3]}, None, "text", ((1.0, 2.0),)), "meta")
    assert (moved[0].device.type, moved[1]["a"][0].device.type) == ("meta", "meta")
    assert (moved[1]["a"][1], *moved[2:]) == (3, None, "text", ((1.0, 2.0),))
