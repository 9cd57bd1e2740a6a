"""`rtn` for GPUs: a lane is a group, and goes through its inputs in order, as a row of the CPU's tiles does.

The weight is laid out as [group, lanes] first, so that neighbouring lanes read neighbouring memory. All `ratios` are judged
in one pass, as rows of a two-dimensional block: each has its own sum. The first of the best is the one that the CPU takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ernie_quant.kernels._triton import cdiv, jit, launch, nearest, round_bf16, unrolled, upper_half
from ernie_quant.kernels.rtn import Array
from ernie_quant.kernels.rtn_reference import decode as decode  # one product and one rounding: the same on every device

LANES = 64  # of a program; 32 for long groups, of which there are fewer
LONG = 1024
SMALLEST = tl.constexpr(2.0**-120)  # rtn.SMALLEST


def encode(
    weight: torch.Tensor, group: int, low: int, high: int, divisor: int, ratios: Array, refine: int, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rtn.encode`: codes int8 [out, in] and bf16 scales [out, in / group] of a bf16 or f32 weight [out, in]."""
    rows, columns = weight.shape
    by_lane = weight.reshape(-1, group).t().contiguous()
    lanes = by_lane.shape[1]
    codes = torch.empty((group, lanes), dtype=torch.int8, device=weight.device)
    scale = torch.empty((rows, columns // group), dtype=torch.bfloat16, device=weight.device)
    tried = triton.next_power_of_2(len(ratios))
    # what fills up to a power of two is the first once more, which is never better than itself
    padded = torch.tensor([*ratios.tolist(), *[float(ratios[0])] * (tried - len(ratios))]).to(weight.device)
    block = LANES if group <= LONG else LANES // 2
    launch(
        _search, (cdiv(lanes, block),), by_lane, codes, scale.view(torch.int16), padded, lanes, group, float(low), float(high),
        float(divisor), refine, signed, tried, block, unrolled(group),
    )  # fmt: skip
    return codes.t().reshape(rows, columns).contiguous(), scale


@jit
def _search(  # type: ignore[no-untyped-def]
    weight, codes, scales, ratios, lanes, group, low, high, divisor, REFINE: tl.constexpr, SIGNED: tl.constexpr,
    TRIED: tl.constexpr, LANES: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)[None, :]
    top = _extreme(weight, lane, lanes, group, SIGNED, UNROLLED)
    ratio = tl.load(ratios + tl.arange(0, TRIED))[:, None]
    trial = _as_scale(tl.div_rn(top * ratio, tl.full((TRIED, LANES), 1.0, tl.float32) * divisor))
    error = _judge(weight, lane, lanes, group, trial, low, high, UNROLLED)
    error = tl.where(error == error, error, float("inf"))  # a NaN is better than nothing, as with `<`
    first = tl.argmin(error, 0, tie_break_left=True)[None, :]
    scale = tl.sum(tl.where(tl.arange(0, TRIED)[:, None] == first, trial, 0.0), 0)[None, :]
    best = tl.min(error, 0)[None, :]
    for _ in tl.static_range(REFINE):
        trial = _least_squares(weight, lane, lanes, group, scale, low, high, UNROLLED)
        error = _judge(weight, lane, lanes, group, trial, low, high, UNROLLED)
        scale = tl.where(error < best, trial, scale)
        best = tl.where(error < best, error, best)
    tl.store(scales + lane, upper_half(scale), mask=lane < lanes)
    _quantize(weight, codes, lane, lanes, group, scale, low, high, UNROLLED)


@jit
def _input(weight, at, there):  # type: ignore[no-untyped-def]
    """One input of every lane as float32; 0 where there is no lane."""
    return tl.load(weight + at, mask=there, other=0.0).to(tl.float32)


@jit
def _as_scale(x):  # type: ignore[no-untyped-def]
    """Rounded to bf16; what is too small for a scale, or no number, becomes 1."""
    x = round_bf16(x)
    return tl.where((tl.abs(x) >= SMALLEST) & (tl.abs(x) < float("inf")), x, 1.0)


@jit
def _extreme(weight, lane, lanes, group, SIGNED: tl.constexpr, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest |x| of each group; negative where the largest x is positive and the scale may be signed."""
    at, there = lane.to(tl.int64), lane < lanes
    low, high = tl.zeros(lane.shape, tl.float32), tl.zeros(lane.shape, tl.float32)
    for _ in range(0, group, UNROLLED):
        for _ in tl.static_range(UNROLLED):
            x = _input(weight, at, there)
            high, low = tl.maximum(high, x), tl.minimum(low, x)
            at += lanes
    return tl.where(high > -low, -high, -low) if SIGNED else tl.maximum(high, -low)


@jit
def _judge(weight, lane, lanes, group, scale, low, high, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Squared errors of the scales [n, LANES], each summed in the order of the inputs."""
    at, there = lane.to(tl.int64), lane < lanes
    inverse, error = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), tl.zeros(scale.shape, tl.float32)
    for _ in range(0, group, UNROLLED):
        for _ in tl.static_range(UNROLLED):
            x = _input(weight, at, there)
            d = x - nearest(x * inverse, low, high) * scale
            error += d * d
            at += lanes
    return error


@jit
def _least_squares(weight, lane, lanes, group, scale, low, high, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """<x, q> / <q, q> of the codes at a scale [1, LANES], as a scale."""
    at, there = lane.to(tl.int64), lane < lanes
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    sum_xq, sum_qq = tl.zeros(scale.shape, tl.float32), tl.zeros(scale.shape, tl.float32)
    for _ in range(0, group, UNROLLED):
        for _ in tl.static_range(UNROLLED):
            x = _input(weight, at, there)
            q = nearest(x * inverse, low, high)
            sum_xq += x * q
            sum_qq += q * q
            at += lanes
    return _as_scale(tl.where(sum_qq > 0, tl.div_rn(sum_xq, tl.where(sum_qq > 0, sum_qq, 1.0)), 1.0))


@jit
def _quantize(weight, codes, lane, lanes, group, scale, low, high, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there = lane.to(tl.int64), lane < lanes
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    for _ in range(0, group, UNROLLED):
        for _ in tl.static_range(UNROLLED):
            q = nearest(_input(weight, at, there) * inverse, low, high)
            tl.store(codes + at, q.to(tl.int8), mask=there)
            at += lanes
