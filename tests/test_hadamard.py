"""The rotation of W4A8: its matrix by hand, its identity, and what FastDeploy's kernel makes of inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.hessians import correlated

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.w4a8 import Weight4Activation8
from ernie_quant.kernels import hadamard, hadamard_reference

H4 = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
WIDTHS = (384, 512, 896, 1536, 3584)  # of down_proj: SmolLM2-135M in parts, the 300B at TP 4, the 21B and the 300B


def sylvester(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def test_four_inputs_by_hand() -> None:
    assert hadamard.transform(torch.eye(4), 4).tolist() == H4
    assert hadamard.transform(torch.tensor([[1.0, 2, 3, 4, 0, 0, 0, 1]]), 4).tolist() == [[10, -2, -4, 0, 1, -1, -1, 1]]


@pytest.mark.parametrize("block", [8, 16, 128, 1024])
def test_the_compiled_one_is_the_plain_one(block: int) -> None:
    matrix = torch.randn(5, 2048, generator=torch.Generator().manual_seed(block))
    found = hadamard.transform(matrix, block)
    assert torch.equal(found, hadamard_reference.transform(matrix, block))
    expected = (matrix.double().numpy().reshape(-1, block) @ sylvester(block)).reshape(matrix.shape)
    assert np.allclose(found.numpy(), expected, atol=1e-5 * block)


@pytest.mark.parametrize("width", WIDTHS)
def test_rotating_both_sides_changes_no_product(width: int) -> None:
    """(H x)^T (H W / B) = x^T W."""
    generator = torch.Generator().manual_seed(width)
    weight, inputs = torch.randn(48, width, generator=generator), torch.randn(9, width, generator=generator)
    turned, seen = hadamard.transform(weight / 128, 128), hadamard.transform(inputs, 128)
    exact = inputs.double() @ weight.double().T
    assert torch.allclose(seen.double() @ turned.double().T, exact, atol=1e-4)


def test_slabs_and_the_source_are_left_alone() -> None:
    matrix = torch.randn(4, 256)
    before = matrix.clone()
    whole = hadamard.transform(matrix, 128)
    assert torch.equal(matrix, before)
    assert torch.equal(torch.cat([hadamard.transform(matrix[:1], 128), hadamard.transform(matrix[1:], 128)]), whole)


def test_the_kernel_sees_bf16_of_every_step() -> None:
    """1 + 2^-9 is 1 in bf16: the kernel adds in the dtype of the activations."""
    inputs = torch.tensor([[256.0, 1.0, 0, 0]])
    assert Weight4Activation8(4).seen(inputs).tolist() == [[256.0, 255.0, 256.0, 255.0]]  # 257 is a tie of bf16
    assert Weight4Activation8().seen(torch.tensor([[1.0 + 2**-9, 3.0]])).tolist() == [[1.0, 3.0]]


def test_inputs_are_rounded_half_away_from_zero_and_clamped() -> None:
    codec, scale = Weight4Activation8(), torch.tensor([127.0])
    inputs = torch.tensor([[0.5, -0.5, 2.5, -3.5, 127.0, -300.0]])
    assert codec.rounded(inputs, scale).tolist() == [[1.0, -1.0, 3.0, -4.0, 127.0, -127.0]]


@pytest.mark.parametrize("block", [0, 128])
def test_rounded_inputs_are_near_the_inputs(block: int) -> None:
    inputs = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    codec = Weight4Activation8(block)
    found = codec.rounded(inputs, codec.seen(inputs).abs().max().reshape(1))
    relative = float((found - inputs).square().sum() / inputs.square().sum())
    assert 1e-6 < relative < 4e-4


@pytest.mark.parametrize("method", ["feedback", "descent"])
def test_feedback_runs_on_the_rotated_inputs(method: str) -> None:
    """The Hessian is that of inputs as they come: the loss on them is below that of rounding."""
    spec, hessian = TensorSpec((64, 256), "BF16"), correlated(256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)).mul(0.02).bfloat16()
    codec = Weight4Activation8(128, method=method)
    encoder = codec.prepare(spec, {"hessian": hessian, "largest": torch.tensor([3.0])})
    assert encoder is not None

    def loss(decoded: torch.Tensor) -> float:
        error = decoded.float() - weight.float()
        return float(((error @ hessian) * error).sum())

    assert encoder.once["activation_scale"].tolist() == [3.0]
    assert loss(codec.decode(encoder.encode(weight))) < 0.6 * loss(codec.decode(codec.encode(weight)))


def test_an_outlier_of_one_input_no_longer_costs_the_others() -> None:
    inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    inputs[:, 5] *= 100

    def error(codec: Weight4Activation8) -> float:
        found = codec.rounded(inputs, codec.seen(inputs).abs().max().reshape(1)) - inputs
        return float(found[:, torch.arange(128) != 5].square().sum())

    assert error(Weight4Activation8(128)) < 0.1 * error(Weight4Activation8())


@pytest.mark.parametrize("size", [3, 1, -128, 2048, 128.0, True])
def test_only_powers_of_two_are_blocks(size: object) -> None:
    with pytest.raises(ValueError, match="hadamard_block_size is"):
        Weight4Activation8(size)  # type: ignore[arg-type]


def test_a_block_divides_the_inputs() -> None:
    assert Weight4Activation8(256).problem(TensorSpec((8, 896), "BF16")) == (
        "w4a8: hadamard_block_size 256 does not divide 896 inputs; 128, 64 would"
    )
