"""ggml's block types: our encoders and decoders beside ggml's own, beside a plain reference, and on odd values."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.llama_cpp import Ggml, needs_llama_cpp
from helpers.plain_ggml import encode as plain_encode

from ernie_quant.dtypes import BLOCKS
from ernie_quant.ggml import NUMBERS
from ernie_quant.kernels import _ggml_bits as bits
from ernie_quant.kernels import ggml_recode

# relative squared error on Gaussian rows: what llama.cpp's own encoder reaches with its best search
MOST = {
    "Q8_0": 2.9e-5, "Q6_K": 3.05e-4, "Q5_K": 0.00122, "Q4_K": 0.0050, "IQ4_XS": 0.0058, "IQ4_NL": 0.0057, "Q4_0": 0.0067,
    "Q5_0": 0.00165, "Q5_1": 0.00116, "Q3_K": 0.0209, "Q2_K": 0.0700,
}  # fmt: skip
WIDTH = 1536
every_type = pytest.mark.parametrize("dtype", MOST)


def kernels(dtype: str) -> ModuleType:
    return importlib.import_module(f"ernie_quant.kernels.ggml_{dtype.lower()}")


def gaussian(rows: int = 96, seed: int = 1) -> torch.Tensor:
    return torch.randn((rows, WIDTH), generator=torch.Generator().manual_seed(seed)).mul(0.02)


def error(weight: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | float = 1.0) -> float:
    x, y = weight.double(), decoded.double()
    return float((importance * (x - y).square()).sum() / (importance * x.square()).sum())


def random_blocks(dtype: str, seed: int) -> np.ndarray:
    """Any bytes, with numbers that are none set to finite ones."""
    raw = np.random.default_rng(seed).integers(0, 256, (64, 4 * BLOCKS[dtype][1]), np.uint8)
    halves = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q5_1": [0, 2]}.get(dtype, [0])
    blocks = raw.reshape(-1, BLOCKS[dtype][1])
    for at in halves:
        blocks[:, at + 1] &= 0xBF  # the highest bit of the exponent: below 2
    return raw


@needs_llama_cpp
@every_type
def test_any_bytes_decode_to_what_ggml_makes_of_them(dtype: str) -> None:
    raw, width = random_blocks(dtype, 7), 4 * BLOCKS[dtype][0]
    expected = Ggml().dequantize(NUMBERS[dtype], raw, width)
    assert np.array_equal(kernels(dtype).decode(torch.from_numpy(raw)).numpy(), expected)


@needs_llama_cpp
@every_type
def test_errors_are_at_most_those_of_ggml(dtype: str) -> None:
    """On Gaussian rows those of its best search; on heavy tails, and where inputs matter unequally, those of its own encoder."""
    found, oracle, number = kernels(dtype), Ggml(), NUMBERS[dtype]
    weight = gaussian(256)
    ours = found.encode(weight)
    assert error(weight, found.decode(ours)) <= MOST[dtype]
    assert oracle.is_valid(number, ours.numpy())
    tails = torch.from_numpy(np.random.default_rng(3).standard_t(5, (96, WIDTH)).astype(np.float32))
    theirs = torch.from_numpy(oracle.dequantize(number, oracle.quantize(number, tails.numpy()), WIDTH))
    assert error(tails, found.decode(found.encode(tails))) <= error(tails, theirs) * 1.0001
    importance = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5)).exp()
    weighted = oracle.quantize(number, weight.numpy(), importance.numpy())
    theirs = torch.from_numpy(oracle.dequantize(number, weighted, WIDTH))
    assert error(weight, found.decode(found.encode(weight, importance)), importance) <= error(weight, theirs, importance) * 1.0001


@needs_llama_cpp
@every_type
@pytest.mark.parametrize("of", ["outliers", "uneven inputs", "one input in sixteen"])
def test_errors_are_at_most_those_of_ggml_where_few_values_decide(dtype: str, of: str) -> None:
    """The largest weight may be the one that matters most, or not at all."""
    noise, weight, importance = torch.Generator().manual_seed(8), gaussian(64, seed=9), torch.ones(WIDTH)
    if of == "outliers":
        weight = torch.where(torch.rand(weight.shape, generator=noise) < 0.01, 30 * weight, weight)
    if of == "uneven inputs":
        importance = (2 * torch.randn(WIDTH, generator=noise)).exp()
    if of == "one input in sixteen":
        importance = (torch.arange(WIDTH) % 16 == 3).float()
    found, oracle, number = kernels(dtype), Ggml(), NUMBERS[dtype]
    raw = oracle.quantize(number, weight.numpy(), importance.numpy())
    theirs = torch.from_numpy(oracle.dequantize(number, raw, WIDTH))
    assert error(weight, found.decode(found.encode(weight, importance)), importance) <= error(weight, theirs, importance) * 1.0001


@every_type
def test_a_step_and_its_opposite_are_both_in_reach(dtype: str) -> None:
    """Three values, as a model trained with them has: no more is lost than float16 does to the step."""
    weight = torch.randint(-1, 2, (16, WIDTH), generator=torch.Generator().manual_seed(4)) * 0.03
    if dtype not in ("IQ4_NL", "IQ4_XS"):  # whose table has no such values
        assert error(weight, kernels(dtype).decode(kernels(dtype).encode(weight))) < 3e-5


@every_type
def test_the_loops_do_what_the_plain_reference_does(dtype: str) -> None:
    weight = gaussian(5, seed=11)
    weight[1] *= weight[1].abs() * 50
    weight[2, :40] = 0
    importance = torch.rand(WIDTH, generator=torch.Generator().manual_seed(6))
    for given in (None, importance):
        assert torch.equal(kernels(dtype).encode(weight, given), plain_encode(dtype, weight, given))


@every_type
def test_bfloat16_and_float32_give_the_same_bytes(dtype: str) -> None:
    weight = gaussian(8).bfloat16()
    assert torch.equal(kernels(dtype).encode(weight), kernels(dtype).encode(weight.float()))


@every_type
def test_rows_are_independent(dtype: str) -> None:
    weight = gaussian(7)
    whole = kernels(dtype).encode(weight)
    assert torch.equal(torch.cat([kernels(dtype).encode(row[None]) for row in weight]), whole)


@every_type
def test_odd_values_are_stored_as_finite_numbers(dtype: str) -> None:
    rows = torch.zeros((9, WIDTH))
    rows[1], rows[2], rows[3] = 0.5, -0.5, 1e-9
    rows[4, ::100] = 3e4
    rows[5] = torch.linspace(-1e30, 1e30, WIDTH)
    rows[6] = 1e-40
    rows[7] = torch.arange(WIDTH) % 7 - 3
    rows[8, 5] = 6e4
    decoded = kernels(dtype).decode(kernels(dtype).encode(rows))
    assert bool(decoded.isfinite().all())
    assert torch.equal(decoded[0], rows[0])
    assert float((decoded[1] - 0.5).abs().max()) < 0.05
    for odd in (math.nan, math.inf, -math.inf):
        rows[3, 3] = odd
        assert bool(kernels(dtype).decode(kernels(dtype).encode(rows)).isfinite().all())


@every_type
@pytest.mark.parametrize("kind", ["none", "some", "huge"])
def test_importance_of_any_kind(dtype: str, kind: str) -> None:
    """None for all: as if all were alike. None for some: they are stored as they come. No overflow."""
    weight, importance = gaussian(16), torch.ones(WIDTH)
    importance *= {"none": 0.0, "some": 1.0, "huge": 1e30}[kind]
    if kind == "some":
        importance[:512], importance[700:] = 0, 1e-30
    encoded = kernels(dtype).encode(weight, importance)
    if kind in ("none", "huge"):
        assert torch.equal(encoded, kernels(dtype).encode(weight))
    assert error(weight, kernels(dtype).decode(encoded)) < 3 * MOST[dtype] + 1e-6


@every_type
def test_codes_can_be_taken_out_and_put_back(dtype: str) -> None:
    blocks = random_blocks(dtype, 8).reshape(-1, BLOCKS[dtype][1])
    codes, copy = bits.codes_of(dtype, blocks), blocks.copy()
    assert codes.max() == (1 << sum(piece.width for piece in bits.pieces(dtype))) - 1
    bits.put_codes(dtype, np.zeros_like(codes), copy)
    assert not bits.codes_of(dtype, copy).any()
    bits.put_codes(dtype, codes, copy)
    assert np.array_equal(copy, blocks)


@every_type
def test_recoding_finds_the_nearest_codes(dtype: str) -> None:
    weight = gaussian(8)
    blocks = kernels(dtype).encode(weight)
    assert torch.equal(ggml_recode.recode(dtype, kernels(dtype).decode(blocks), blocks), blocks)
    other = blocks.clone()
    other.view(-1)[BLOCKS[dtype][1] // 2] ^= 1
    back = ggml_recode.recode(dtype, weight, other)
    assert error(weight, kernels(dtype).decode(back)) <= error(weight, kernels(dtype).decode(other))


@pytest.mark.parametrize(("dtype", "low", "high"), [("Q4_0", -8, 8), ("Q8_0", -128, 128)])
def test_codes_of_others_are_taken_over(dtype: str, low: int, high: int) -> None:
    codes = torch.randint(low, high, (6, 128), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    scale = torch.randn((6, 4), generator=torch.Generator().manual_seed(3)).half()
    decoded = kernels(dtype).decode(kernels(dtype).pack(codes, scale))
    assert torch.equal(decoded, codes.float() * scale.float().repeat_interleave(32, 1))
