"""`rtn` for GPUs: 16 lanes for a group, which sum what the lanes of `_registers` sum, in the same order, and are folded alike.

A program has some groups and goes through their inputs 16 at a time: one sector of memory for each group and step. All `ratios`
are judged in one pass, as the first axis of a block: each has its own sums. The first of the best is the one that the CPU
takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ernie_quant.kernels._triton import (
    cdiv,
    folded,
    jit,
    launch,
    lost,
    nearest,
    round_bf16,
    sums_of_rows,
    totals,
    unrolled,
    upper_half,
)
from ernie_quant.kernels.rtn import Array, Sums
from ernie_quant.kernels.rtn_reference import decode as decode  # one product and one rounding: the same on every device

SUMS = 256  # of a program: groups, times scales that are tried together; each has 16 lanes
MOST, LONG, MOST_LONG = 32, 1024, 16  # groups of a program; of long ones there are fewer
AT_ONCE = 4  # loads of a loop that are written out
SMALLEST = tl.constexpr(2.0**-120)  # rtn.SMALLEST


def encode(
    weight: torch.Tensor, group: int, low: int, high: int, divisor: int, ratios: Array, refine: int, signed: bool
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    """`rtn.encode`: codes int8 [out, in] and bf16 scales [out, in / group] of a bf16 or f32 weight [out, in]; what they lost."""
    rows, columns = weight.shape
    groups = columns // group
    count, device = rows * groups, weight.device
    codes = torch.empty((rows, columns), dtype=torch.int8, device=device)
    scale = torch.empty((rows, groups), dtype=torch.bfloat16, device=device)
    sums = torch.empty((2, groups, rows), dtype=torch.float64, device=device)
    largest = torch.empty(count, dtype=torch.float32, device=device)
    tried = triton.next_power_of_2(len(ratios))
    # what fills up to a power of two is the first once more, which is never better than itself
    padded = torch.tensor([*ratios.tolist(), *[float(ratios[0])] * (tried - len(ratios))]).to(device)
    together = min(SUMS // tried, MOST if group <= LONG else MOST_LONG)
    launch(
        _search, (cdiv(count, together),), weight.contiguous(), codes, scale.view(torch.int16), sums, largest, padded, count,
        group, groups, float(low), float(high), float(divisor), refine, signed, tried, together,
        min(unrolled(cdiv(group, 16)), AT_ONCE),
    )  # fmt: skip
    return codes, scale, totals(sums_of_rows(sums), largest)


@jit
def _search(  # type: ignore[no-untyped-def]
    weight, codes, scales, sums, largest, ratios, count, group, groups, low, high, divisor, REFINE: tl.constexpr,
    SIGNED: tl.constexpr, TRIED: tl.constexpr, GROUPS: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Scales are [tried, groups, 1], inputs [1, groups, 16]."""
    which = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    first, there = (which.to(tl.int64) * group)[None, :, None], (which < count)[None, :, None]
    top = _extreme(weight, first, there, group, SIGNED, UNROLLED)
    ratio = tl.load(ratios + tl.arange(0, TRIED))[:, None, None]
    trial = _as_scale(tl.div_rn(top * ratio, tl.full((TRIED, GROUPS, 1), 1.0, tl.float32) * divisor))
    error = _judge(weight, first, there, group, trial, low, high, UNROLLED)
    error = tl.where(error == error, error, float("inf"))  # a NaN is better than nothing, as with `<`
    chosen = tl.arange(0, TRIED)[:, None, None] == tl.argmin(error, 0, tie_break_left=True)[None, :, :]
    scale, best = tl.sum(tl.where(chosen, trial, 0.0), 0)[None, :, :], tl.min(error, 0)[None, :, :]
    for _ in tl.static_range(REFINE):
        trial = _least_squares(weight, first, there, group, scale, low, high, UNROLLED)
        error = _judge(weight, first, there, group, trial, low, high, UNROLLED)
        scale = tl.where(error < best, trial, scale)
        best = tl.where(error < best, error, best)
    tl.store(scales + which[None, :, None], upper_half(scale), mask=there)
    error, energy, most = _quantize(weight, codes, first, there, group, scale, low, high, UNROLLED)
    rows = count // groups
    place = ((which % groups).to(tl.int64) * rows + which // groups)[None, :, None]  # rows lie side by side
    tl.store(sums + place, error, mask=there)
    tl.store(sums + count + place, energy, mask=there)
    tl.store(largest + which[None, :, None], most, mask=there)


@jit
def _inputs(weight, first, there, group, at):  # type: ignore[no-untyped-def]
    """16 inputs of every group from `at` on, as float32, where in memory they lie, and whether they are; zeros behind its end."""
    place = at + tl.arange(0, 16)[None, None, :]
    are = there & (place < group)
    return tl.load(weight + first + place, mask=are, other=0.0).to(tl.float32), first + place, are


@jit
def _as_scale(x):  # type: ignore[no-untyped-def]
    """Rounded to bf16; what is too small for a scale, or no number, becomes 1."""
    x = round_bf16(x)
    return tl.where((tl.abs(x) >= SMALLEST) & (tl.abs(x) < float("inf")), x, 1.0)


@jit
def _inverse(scale):  # type: ignore[no-untyped-def]
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@jit
def _extreme(weight, first, there, group, SIGNED: tl.constexpr, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest |x| of each group; negative where the largest x is positive and the scale may be signed."""
    low, high = tl.zeros((1, first.shape[1], 16), tl.float32), tl.zeros((1, first.shape[1], 16), tl.float32)
    for block in range(0, group, 16 * UNROLLED):
        for step in tl.static_range(UNROLLED):
            x, _, _ = _inputs(weight, first, there, group, block + 16 * step)
            high, low = tl.maximum(high, x), tl.minimum(low, x)
    top, bottom = tl.max(high, 2)[:, :, None], tl.min(low, 2)[:, :, None]
    return tl.where(top > -bottom, -top, -bottom) if SIGNED else tl.maximum(top, -bottom)


@jit
def _judge(weight, first, there, group, scale, low, high, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """|x - q scale|^2 of scales [n, groups, 1], in float64, from sums in units of the scale."""
    inverse, lanes = _inverse(scale), tl.zeros((scale.shape[0], scale.shape[1], 16), tl.float32)
    for block in range(0, group, 16 * UNROLLED):
        for step in tl.static_range(UNROLLED):
            x, _, _ = _inputs(weight, first, there, group, block + 16 * step)
            y = x * inverse
            miss = y - nearest(y, low, high)
            lanes += miss * miss
    wide = scale.to(tl.float64)
    return folded(lanes).to(tl.float64) * (wide * wide)


@jit
def _least_squares(weight, first, there, group, scale, low, high, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """<x, q> / <q, q> of the codes at a scale [1, groups, 1], as a scale."""
    inverse = _inverse(scale)
    with_x, with_itself = tl.zeros((1, scale.shape[1], 16), tl.float32), tl.zeros((1, scale.shape[1], 16), tl.float32)
    for block in range(0, group, 16 * UNROLLED):
        for step in tl.static_range(UNROLLED):
            x, _, _ = _inputs(weight, first, there, group, block + 16 * step)
            q = nearest(x * inverse, low, high)
            with_x += x * q
            with_itself += q * q
    above, below = folded(with_x), folded(with_itself)
    return _as_scale(tl.where(below > 0, tl.div_rn(above, tl.where(below > 0, below, 1.0)), 1.0))


@jit
def _quantize(weight, codes, first, there, group, scale, low, high, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes codes; of each group |x - w|^2 and |x|^2 for what is decoded, w, in float64, and the largest |x - w|."""
    inverse, most = _inverse(scale), tl.zeros((1, scale.shape[1], 16), tl.float32)
    error, energy = tl.zeros((1, scale.shape[1], 16), tl.float64), tl.zeros((1, scale.shape[1], 16), tl.float64)
    for block in range(0, group, 16 * UNROLLED):
        for step in tl.static_range(UNROLLED):
            x, place, are = _inputs(weight, first, there, group, block + 16 * step)
            q = nearest(x * inverse, low, high)
            tl.store(codes + place, q.to(tl.int8), mask=are)
            error, energy, most = lost(x, round_bf16(q * scale), error, energy, most)
    return folded(error), folded(energy), tl.max(most, 2)[:, :, None]
