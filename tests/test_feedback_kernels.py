"""The loops of error feedback and descent against plain torch, to the bit, and against the textbook's feedback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.hessians import correlated

from ernie_quant.codecs.ccq import CANDIDATES
from ernie_quant.kernels import ccq_feedback, ccq_feedback_reference, curvature, feedback, rtn_feedback, rtn_feedback_reference
from ernie_quant.kernels.rtn_feedback import Grid

SEARCHED = (1.0, 0.86, 0.74)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


GRIDS = [Grid(16, -8, 7, 8, SEARCHED, True), Grid(64, -7, 7, 7, SEARCHED, False), Grid(32, -128, 127, 128, (1.0,), True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_integers_with_feedback_and_descent(grid: Grid, per_row: bool) -> None:
    width = 70 if per_row else 64  # a row's block need not be a multiple of four
    inputs = curvature.inputs(correlated(width), 0.1)
    weight, block = gaussian(width, feedback.TILE), slice(0, width)
    given = torch.full((feedback.TILE,), 2.0 / grid.high).bfloat16().float() if per_row else None
    tile = rtn_feedback.IntegerTile(width, replace(grid, group=width) if per_row else grid, given)
    errors = tile.feedback(block, weight, inputs.upper)
    plain = rtn_feedback_reference.feedback_block(weight, inputs.upper, grid, given)
    for mine, other in zip((tile.codes, tile.scale, tile.decoded, errors), plain, strict=True):
        assert same(mine, other)

    gradient = inputs.curvature @ (tile.decoded - weight)
    change = tile.descend(block, gradient, inputs.curvature)
    after = rtn_feedback_reference.descend_block(gradient, inputs.curvature, grid, not per_row, *plain[:3])
    for mine, other in zip((tile.codes, tile.scale, tile.decoded), after, strict=True):
        assert same(mine, other)
    assert same(change, after[2] - plain[2])
    assert change.any()


def test_wint2_with_feedback_and_descent() -> None:
    prepared = ccq_feedback.prepare(correlated(64), 0.1, CANDIDATES[:2])
    weight, block, pair = gaussian(64, feedback.TILE), slice(0, 64), 1
    weight[:, 5] = 0
    weight[:, 6] /= 50  # of a row whose other groups are louder
    tile = ccq_feedback.CodeTile(weight, prepared, pair)
    tile.super_scale[6] *= 50
    upper, of = prepared.inputs.upper, prepared.of_feedback
    errors = tile.feedback(block, weight, upper)
    plain = ccq_feedback_reference.feedback_group(
        weight, upper, prepared.inverse, of.matrix, of.half[:, pair], tile.values, tile.super_scale
    )
    for mine, other in zip((tile.codes, tile.local_scale[0], tile.decoded, errors), plain, strict=True):
        assert same(mine, other)
    assert plain[1].unique().numel() > 3

    hessian, of = prepared.inputs.curvature, prepared.of_descent
    gradient = hessian @ (tile.decoded - weight)
    change = tile.descend(block, gradient, hessian)
    after = ccq_feedback_reference.descend_group(
        gradient, hessian, of.matrix, of.half[:, pair], tile.values, tile.super_scale, *plain[:3]
    )
    for mine, other in zip((tile.codes, tile.local_scale[0], tile.decoded), after, strict=True):
        assert same(mine, other)
    assert same(change, after[2] - plain[2])
    assert change.any()


def test_the_byte_is_the_nearest_in_the_metric_of_its_inputs() -> None:
    prepared = ccq_feedback.prepare(correlated(64), 0.1, CANDIDATES[:1])
    z, values = gaussian(4, 50), prepared.values[0]
    wanted = z.T * 20
    for metric in (prepared.of_feedback, prepared.of_descent):
        a = metric.matrix[3]
        found = ccq_feedback_reference.best_bytes((wanted @ a).T.contiguous(), values, metric.half[3, 0])
        miss = (wanted[:, None] - values).double()
        distance = ((miss @ a.double()) * miss).sum(2)
        assert (distance.gather(1, found[:, None])[:, 0] <= distance.amin(1) * (1 + 1e-4)).all()


def test_two_inputs_by_hand() -> None:
    """H = [[1, .5], [.5, 1]], w = (1.4, .4), scale 1: 1.4 is rounded to 1, and .4 + .5 * .4 = .6 to 1."""
    inputs = curvature.Inputs(hessian := torch.tensor([[1.0, 0.5], [0.5, 1.0]]), curvature.inverse_factor(hessian))
    weight = torch.tensor([[1.4, 0.4], [1.4, -0.6]])
    codes, _ = rtn_feedback.encode(weight, inputs, Grid(2, -8, 7, 8, (), True), 0, lambda rows: torch.ones(2))
    assert codes.tolist() == [[1, 1], [1, 0]]


def test_feedback_is_that_of_the_textbook() -> None:
    """Input by input in float64, with the factor of H^-1 that GPTQ takes: another way to the same codes."""
    hessian, weight = correlated(320), gaussian(40, 320)
    inputs, grid = curvature.inputs(hessian, 0.3), Grid(320, -8, 7, 8, (), True)
    codes, scales = rtn_feedback.encode(weight, inputs, grid, 0, lambda rows: rows.abs().amax(1) / 7)
    scale, damped = scales[:, 0], curvature.damped(hessian, 0.3).double()
    upper, rest = torch.linalg.cholesky(damped.inverse(), upper=True), weight.double()
    plain = torch.empty_like(codes)
    for j in range(320):
        plain[:, j] = (rest[:, j] / scale.double()).round().clamp(-8, 7).to(torch.int8)
        error = (rest[:, j] - (plain[:, j] * scale).double()) / upper[j, j]
        rest[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    assert (codes == plain).float().mean() > 0.98  # a code at the edge turns what follows in its row


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = curvature.damped(correlated(1100), 0.3)
    upper = curvature.inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    assert (upper.double() @ hessian.double() @ upper.double().T - torch.eye(1100)).abs().max() < 1e-4
