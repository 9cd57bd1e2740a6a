"""The search of WINT2's scales for GPUs: the steps of ccq_search, each for all rows at once; ccq_reference has the reasons.

A lane is a group of 64 inputs, which are laid out as [64, lanes] in stored order. The 8 listed bytes of a vector of 4 weights
are the second axis of a block, so that a thread reads a line of ccq_lists in four loads. Scores are whole numbers; sums over
the groups of a row are made in order, by a program of its own for each row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ernie_quant.kernels._triton import cdiv, jit, launch, nearest, round_bf16
from ernie_quant.kernels.ccq_lists import LAST_TWO, LINE, NORMS, tables
from ernie_quant.kernels.ccq_reference import CELLS, FACTORS, GROUP, LISTED, MAX_LOCAL, PER_PEAK, PER_RMS, Pair

LANES = 128  # of a program
INPUTS, VECTORS, TRIED = tl.constexpr(GROUP), tl.constexpr(GROUP // 4), tl.constexpr(LISTED)
IN_ALL, MOST = tl.constexpr(CELLS), tl.constexpr(float(MAX_LOCAL))
HALVES, LAST, WORDS, NORM = (tl.constexpr(n) for n in (LINE // 2, LAST_TWO // 2, LINE // 4, NORMS // 4))


def search(stored: torch.Tensor, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Local scales uint8 [out, in/64], super scales f32 [out] and pairs int64 [out] of a weight f32 [out, in] in stored order."""
    device, rows, groups, lanes = stored.device, len(stored), stored.shape[1] // GROUP, stored.numel() // GROUP
    by_lane = stored.reshape(lanes, GROUP).t().contiguous()
    constants, table = _tables(tuple(pairs), str(device))
    halves, words = table.view(torch.int16), table.view(torch.int32)
    blocks = cdiv(lanes, LANES)

    energy, liked = torch.empty(lanes, dtype=torch.float64, device=device), torch.empty(lanes, device=device)
    launch(_liked_scales, (blocks,), by_lane, constants, energy, liked, lanes, LANES)
    super_scale = torch.empty(rows, device=device)
    launch(_super_scales, (rows,), liked, energy, constants, super_scale, groups, len(FACTORS), num_warps=1)
    gain = torch.empty((len(pairs), lanes), dtype=torch.float64, device=device)
    launch(_gains, (blocks, len(pairs)), by_lane, liked, super_scale, halves, words, gain, lanes, groups, LANES)
    pair = torch.empty(rows, dtype=torch.int64, device=device)
    tried = triton.next_power_of_2(len(pairs))
    launch(_best_pairs, (rows,), gain, pair, lanes, groups, len(pairs), tried, num_warps=1)
    local_scale = torch.empty((rows, groups), dtype=torch.uint8, device=device)
    launch(_best_locals, (blocks,), by_lane, liked, super_scale, pair, gain, halves, words, local_scale, lanes, groups, LANES)
    return local_scale, super_scale, pair


@functools.lru_cache(maxsize=64)
def _tables(pairs: tuple[Pair, ...], device: str) -> tuple[torch.Tensor, ...]:
    """The factors of super scales and what liked scales are made with, f64; lines of the pairs."""
    constants = torch.tensor([*FACTORS, PER_RMS, PER_PEAK], dtype=torch.float64)
    return tuple(table.to(device) for table in (constants, tables(pairs).lines))


@jit
def _liked_scales(stored, constants, energy, liked, lanes, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each group likes, from its energy and its largest |w|."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    at, there = lane.to(tl.int64), lane < lanes
    total, peak = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float32)
    for _ in range(0, INPUTS, 8):
        for _ in tl.static_range(8):
            x = tl.load(stored + at, mask=there, other=0.0)
            total += x.to(tl.float64) * x.to(tl.float64)
            peak = tl.maximum(peak, tl.abs(x))
            at += lanes
    per_rms, per_peak = tl.load(constants + 32), tl.load(constants + 33)  # from memory: constants of a kernel may be float32
    like = tl.maximum(tl.sqrt(total * 0.015625) * per_rms, peak.to(tl.float64) * per_peak)
    tl.store(energy + lane, total, mask=there)
    tl.store(liked + lane, round_bf16(like.to(tl.float32)), mask=there)


@jit
def _super_scales(liked, energy, constants, super_scale, groups, FACTORS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program is a row, a lane a factor: the first whose multiples lie nearest to the liked scales."""
    first = tl.program_id(0).to(tl.int64) * groups
    loudest = tl.load(liked + first)
    for g in range(1, groups):
        loudest = tl.maximum(loudest, tl.load(liked + first + g))
    factor = tl.load(constants + tl.arange(0, FACTORS))
    ideal = round_bf16((loudest.to(tl.float64) * factor).to(tl.float32))
    multiple, loss = ideal.to(tl.float64), tl.zeros((FACTORS,), tl.float64)
    for g in range(0, groups):
        like = tl.load(liked + first + g).to(tl.float64) + tl.zeros((FACTORS,), tl.float64)
        times = tl.minimum(tl.maximum(_rint(like / multiple), 1.0), MOST)
        miss = times * multiple / like - 1.0
        # 0 / 0 where nothing is liked
        loss += tl.where(like > 0, tl.load(energy + first + g) * tl.minimum(miss * miss, 1.0), 0.0)
    chosen = tl.arange(0, FACTORS) == tl.argmin(loss, 0, tie_break_left=True)
    tl.store(super_scale + tl.program_id(0), tl.sum(tl.where(chosen, ideal, 0.0), 0))


@jit
def _rint(x):  # type: ignore[no-untyped-def]
    """float64 rounded to an integer, half to even."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@jit
def _start(liked, super_scale):  # type: ignore[no-untyped-def]
    """The local scale that comes nearest to what a group likes, as float32."""
    wide = tl.where(liked > 0, super_scale, 1.0).to(tl.float64)
    return tl.minimum(_rint(liked.to(tl.float64) / wide), MOST).to(tl.float32)


@jit
def _axis(x):  # type: ignore[no-untyped-def]
    """How many edges of 8 is x, in units of 1/512, away from -32.5?"""
    return tl.minimum(tl.maximum((x + 16640) >> 12, 0), 7)


@jit
def _placed(stored, at, there, inverse):  # type: ignore[no-untyped-def]
    """512 * w / scale in whole numbers."""
    return nearest(tl.load(stored + at, mask=there, other=0.0) * inverse, -32767.0, 32767.0).to(tl.int32)


@jit
def _inverse(scale):  # type: ignore[no-untyped-def]
    """512 / scale, 0 where that is 0."""
    return tl.where(scale > 0, tl.div_rn(tl.full(scale.shape, 512.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0)


@jit
def _scores(stored, at, there, lanes, inverse, halves, words, pair):  # type: ignore[no-untyped-def]
    """512 (x.p - |p|^2 / 2) of the 8 bytes listed for the vector that begins at `at`: int32 [lanes, 8]."""
    x0, x1 = _placed(stored, at, there, inverse), _placed(stored, at + lanes, there, inverse)
    x2, x3 = _placed(stored, at + 2 * lanes, there, inverse), _placed(stored, at + 3 * lanes, there, inverse)
    line = pair * IN_ALL + ((_axis(x0) << 9) | (_axis(x1) << 6) | (_axis(x2) << 3) | _axis(x3))
    byte = tl.arange(0, TRIED)[None, :]
    first = tl.load(halves + line[:, None] * HALVES + byte).to(tl.int32)  # two int8 in 16 bits
    last = tl.load(halves + line[:, None] * HALVES + LAST + byte).to(tl.int32)
    score = tl.load(words + line[:, None] * WORDS + NORM + byte)
    score += x0[:, None] * ((first << 24) >> 24) + x1[:, None] * (first >> 8)
    score += x2[:, None] * ((last << 24) >> 24) + x3[:, None] * (last >> 8)
    return score


@jit
def _gain(stored, lane, there, lanes, scale, halves, words, pair):  # type: ignore[no-untyped-def]
    """Half of what the bytes explain of each group at a scale: f64."""
    at, inverse = lane.to(tl.int64), _inverse(scale)
    total = tl.zeros(scale.shape, tl.int32)
    for _ in range(0, VECTORS):
        total += tl.max(_scores(stored, at, there, lanes, inverse, halves, words, pair), 1)
        at += 4 * lanes
    wide = scale.to(tl.float64)
    return (total.to(tl.float64) * 0.001953125) * (wide * wide)


@jit
def _gains(stored, liked, super_scale, halves, words, gain, lanes, groups, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of every group with every pair, at the local scale that it starts from."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there, pair = lane < lanes, tl.program_id(1)
    top = tl.load(super_scale + lane // groups, mask=there, other=1.0)
    scale = round_bf16(_start(tl.load(liked + lane, mask=there, other=0.0), top) * top)
    found = _gain(stored, lane, there, lanes, scale, halves, words, pair)
    tl.store(gain + pair.to(tl.int64) * lanes + lane, found, mask=there)


@jit
def _best_pairs(gain, pair, lanes, groups, pairs, TRIED_PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program is a row, a lane a pair: the first that explains most, summed group after group."""
    which, first = tl.arange(0, TRIED_PAIRS), tl.program_id(0).to(tl.int64) * groups
    total = tl.zeros((TRIED_PAIRS,), tl.float64)
    for g in range(0, groups):
        total += tl.load(gain + which.to(tl.int64) * lanes + first + g, mask=which < pairs, other=0.0)
    best = tl.argmax(tl.where(which < pairs, total, -float("inf")), 0, tie_break_left=True)
    tl.store(pair + tl.program_id(0), best.to(tl.int64))


@jit
def _best_locals(  # type: ignore[no-untyped-def]
    stored, liked, super_scale, pair, gain, halves, words, local_scale, lanes, groups, LANES: tl.constexpr
):
    """Local scales near those that groups start from: one below, one above, one further where that has gained."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there, row = lane < lanes, lane // groups
    top = tl.load(super_scale + row, mask=there, other=1.0)
    which = tl.load(pair + row, mask=there, other=0).to(tl.int32)
    start = _start(tl.load(liked + lane, mask=there, other=0.0), top)
    known = tl.load(gain + which.to(tl.int64) * lanes + lane, mask=there, other=0.0)
    local, known = tl.where(known > 0, start, 0.0), tl.maximum(known, 0.0)
    for step in tl.static_range(3):
        near = start - 1.0 if step == 0 else start + 1.0
        trial = tl.minimum(tl.maximum(2.0 * local - start if step == 2 else near, 0.0), MOST)
        found = _gain(stored, lane, there, lanes, round_bf16(trial * top), halves, words, which)
        local, known = tl.where(found > known, trial, local), tl.maximum(found, known)
    tl.store(local_scale + lane, local.to(tl.uint8), mask=there)
