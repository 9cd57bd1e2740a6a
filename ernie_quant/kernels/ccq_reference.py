"""WINT2, convolutional code quantization (CCQ), in plain torch: what the compiled search and decoder are held to.

One byte codes 4 weights. With `c = floor(byte * code_scale + code_zp + 0.5)` (15 bits), its four 6-bit windows, which
overlap by 3 bits, are the values

    v_i = ((c >> s_i) & 63) - 32,  s = 9, 6, 3, 0        w_i = bf16(v_i * bf16(local_scale * super_scale))

as FastDeploy's kernels compute them (PaddlePaddle/FastDeploy, custom_ops/gpu_ops; arXiv 2507.07145). Weights come and go in
logical order. Codes are in *stored* order: within each group of 64 inputs, position 16a + 2b + c holds logical input
8b + 2a + c (FastDeploy PR 2990). Groups, and so local scales, are the same in both.

The search maximizes what the codes explain. Over bytes with values p, for x = w / s,

    sum |w - s p|^2 = sum |w|^2 - 2 s^2 sum (x.p - |p|^2 / 2)

so the sum of the largest `x.p - |p|^2 / 2` of each 4 weights, times s^2, is the gain of scale s. x is rounded to 1/512
and clipped below 64 (twice what a code reaches). Then every product and every partial sum is a multiple of 1/512 below 2^14:
float32 and integers hold it exactly, and any order of summation, fused or not, on any machine, gives the same bits. The
largest of 8 bytes is taken, those that are listed for the cell of x (`listed`, with reasons in ccq_lists). The bytes that
are stored are chosen by the distance to the decoded bf16 weights in float64, without grid and clipping: the nearest of all
256, the lower one of two.

A row: from energy and peak of each group the scale that it likes; the super scale whose multiples fit these best; with the
local scales that follow the pair that explains most; with that pair the local scales one step below and above, and one
further where a step has gained.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

Pair = tuple[float, float]  # code_scale, code_zp

GROUP = 64  # inputs per local scale
SHIFTS = (9, 6, 3, 0)
MAX_LOCAL = 15
# Peaks of a row. The smallest super scale is peak / (8 * 19 * 59), and 512 / scale must be finite; 2^-104 < 5e-32.
# The largest decoded weight is below 5 * peak, and must not overflow bf16.
MIN_PEAK, MAX_PEAK = 2.0**-104, 2.0**120

PER_RMS, PER_PEAK = 1 / 15.25, 1 / 58  # liked scale = the larger of rms and peak of a group times these
CELLS, LISTED = 8**4, 8  # cells with edges of 8 (ccq_lists has the reasons), and bytes that are tried for each
# super scale = factor * largest liked scale of the row: from 1/9 (large locals are left unused) to 1/59 (the loudest
# groups are clipped at 15), in steps of 6%. Repeated products, because pow() differs between machines.
FACTORS = [1 / 9]
while len(FACTORS) < 32:
    FACTORS.append(FACTORS[-1] * 16 / 17)


def encode(weight: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """`ccq.encode` in plain torch."""
    stored = encodable(weight)
    rows = max(1, 8192 // stored.shape[1])  # so many fit the processor's cache
    parts = [_encode_rows(stored[first : first + rows], pairs) for first in range(0, len(stored), rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def decode(encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """`ccq.decode` in plain torch."""
    values = code_values(encoded["code_scale"], encoded["code_zp"])  # [out, 256, 4]
    values = values.gather(1, encoded["codes"].long()[:, :, None].expand(-1, -1, 4)).flatten(1)  # [out, in]
    scale = _bf16(encoded["local_scale"] * encoded["super_scale"].float()[:, None])  # [out, in/64]
    stored = (values * scale.repeat_interleave(GROUP, 1)).to(torch.bfloat16)
    return stored.view(len(stored), -1, GROUP)[:, :, stored_order().argsort()].flatten(1)


def stored_order() -> torch.Tensor:
    """int64 [64]: the logical input of each stored position."""
    a, b, c = torch.arange(4)[:, None, None], torch.arange(8)[:, None], torch.arange(2)
    return (8 * b + 2 * a + c).flatten()


def stored_positions(width: int) -> torch.Tensor:
    """int64 [width]: the same for all groups of a row."""
    return (torch.arange(0, width, GROUP)[:, None] + stored_order()).flatten()


def encodable(weight: torch.Tensor) -> torch.Tensor:
    """f32 [out, in] in stored order, with zeros for rows that cannot be encoded."""
    stored = weight.detach().float().reshape(len(weight), -1, GROUP)[:, :, stored_order()].flatten(1)
    peak = torch.maximum(stored.amax(1), -stored.amin(1))
    stored[~((peak >= MIN_PEAK) & (peak <= MAX_PEAK))] = 0  # a NaN is neither
    return stored


def score_tables(pairs: Sequence[Pair]) -> torch.Tensor:
    """f32 [pairs, 256, 5]: the four values of each byte and minus half their squared norm, what a score multiplies by."""
    scale, zp = torch.tensor(pairs, dtype=torch.float32).T
    values = code_values(scale, zp).float()
    return torch.cat([values, -0.5 * values.square().sum(2, keepdim=True)], 2)


def listed(values: torch.Tensor) -> torch.Tensor:
    """int64 [CELLS, LISTED], in order: the bytes nearest to the middle of each cell, the lower of two; values int32 [256, 4].

    Cell i of an axis has its middle at 8 i - 28.5, as values lie around -.5; the first and the last, which stand for all
    beyond, 2 further out.
    """
    middle = 16 * torch.arange(8) - 57  # doubled, so that all is whole
    middle[0], middle[-1] = middle[0] - 4, middle[-1] + 4
    middles = torch.cartesian_prod(*[middle] * 4)
    distance = sum((2 * values[:, i].long() - middles[:, i, None]).square() for i in range(4))
    nearest = (256 * distance + torch.arange(256)).topk(LISTED, largest=False).values % 256
    return nearest.sort().values


@functools.cache
def _listed(pair: Pair) -> torch.Tensor:
    return listed(score_tables([pair])[0, :, :4].to(torch.int32))


def code_values(code_scale: torch.Tensor, code_zp: torch.Tensor) -> torch.Tensor:
    """f32 [n], f32 [n] -> the values of the 256 bytes: int32 [n, 256, 4], in [-32, 31]."""
    byte = torch.arange(256, dtype=torch.float64)
    # the product is exact in float64 and the sum is rounded once: a fused multiply-add
    code = (byte * code_scale.double()[:, None] + code_zp.double()[:, None]).float() + 0.5
    return ((code.floor().to(torch.int32)[:, :, None] >> torch.tensor(SHIFTS, dtype=torch.int32)) & 63) - 32


def fields(
    codes: torch.Tensor, local_scale: torch.Tensor, super_scale: torch.Tensor, pair: torch.Tensor, pairs: Sequence[Pair]
) -> dict[str, torch.Tensor]:
    """What `encode` returns, from super_scale f32 [out] (already rounded) and pair int64 [out], a place in `pairs`."""
    table = torch.tensor(pairs, dtype=torch.float32).to(pair.device)
    return {
        "codes": codes,
        "local_scale": local_scale,
        "super_scale": super_scale.to(torch.bfloat16),
        "code_scale": table[:, 0][pair],
        "code_zp": table[:, 1][pair],
    }


def _bf16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bf16, as f32."""
    return x.to(torch.bfloat16).float()


def _scores(
    weight: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, lists: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the listed bytes, and these: f32 and int64 [rows, vectors, LISTED].

    weight f32 [rows, groups, 64], scale f32 [rows, groups], and for each row table f32 [rows, 256, 5], lists int64 [rows,
    CELLS, LISTED].
    """
    rows = len(weight)
    inverse = torch.where(scale > 0, 512 / scale, 0)
    x = ((weight * inverse[:, :, None]).clamp(-32767, 32767).round() / 512).view(rows, -1, 4)
    axis = ((x + 32.5) / 8).floor().clamp(0, 7).long()
    cell = ((8 * axis[..., 0] + axis[..., 1]) * 8 + axis[..., 2]) * 8 + axis[..., 3]
    row = torch.arange(rows)[:, None]
    bytes_ = lists[row, cell]
    near = table[row[..., None], bytes_]  # [rows, vectors, LISTED, 5]
    return (x[:, :, None, :] * near[..., :4]).sum(3) + near[..., 4], bytes_  # exact in float32, see above


def _gains(weight: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
    """Half of what the bytes explain of each group: f64 [rows, groups]."""
    best = _scores(weight, scale, table, lists)[0].amax(2)
    return best.double().view(*scale.shape, 16).sum(2) * scale.double().square()


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over dim 1, first to last: float64 sums that the kernel must meet bit for bit have a fixed order."""
    total = torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        total = total + x[:, i]
    return total


def _liked_scales(weight: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """The scale that each group likes: f32 [rows, groups, 64], f64 [rows, groups] -> f32 [rows, groups]."""
    peak = weight.abs().amax(2).double()
    return _bf16(torch.maximum((energy / GROUP).sqrt() * PER_RMS, peak * PER_PEAK).float())


def _super_scales(liked: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """The super scale whose multiples 1 to 15 lie nearest to the liked scales: f32 [rows, groups] -> f32 [rows].

    Judged by sum over groups of energy * min(1, (local * super / liked - 1)^2).
    """
    factors = torch.tensor(FACTORS, dtype=torch.float64)
    scale = _bf16((liked.amax(1).double()[:, None] * factors).float())  # [rows, factors]
    multiple, liked = scale.double()[:, None, :], liked.double()[:, :, None]
    local = (liked / multiple).round().clamp(1, MAX_LOCAL)
    miss = torch.where(liked > 0, (local * multiple / liked - 1).square().clamp(max=1), 0)
    return scale.gather(1, _row_sum(energy[:, :, None] * miss).argmin(1, keepdim=True))[:, 0]


def _best_locals(
    weight: torch.Tensor, scale: torch.Tensor, start: torch.Tensor, gain: torch.Tensor, table: torch.Tensor, lists: torch.Tensor
) -> torch.Tensor:
    """The best local scale of each group near `start`, whose gain is known: int64 [rows, groups]; no gain is 0."""
    local, best = torch.where(gain > 0, start, 0), gain.clamp(min=0)
    for step in (-1, 1, None):
        trial = (2 * local - start if step is None else start + step).clamp(0, MAX_LOCAL)
        gain = _gains(weight, _bf16(trial * scale[:, None]), table, lists)
        local = torch.where(gain > best, trial, local)
        best = torch.maximum(gain, best)
    return local


def _nearest_bytes(weight: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The byte whose decoded weights are nearest, the lower one of two: f32 [groups, 64], f32 [groups], int32 [256, 4]."""
    decoded = _bf16(values * scale[:, None, None]).double()  # [groups, 256, 4]
    target = weight.double().view(-1, 16, 1, 4)
    distance = torch.zeros(())
    for i in range(4):
        distance = distance + (target[..., i] - decoded[:, None, :, i]).square()
    return distance.argmin(2).to(torch.uint8).view(-1)


def _encode_rows(weight: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """The fields of a few rows that are in stored order."""
    rows = len(weight)
    tables = score_tables(pairs)
    lists = torch.stack([_listed(pair) for pair in pairs])
    weight = weight.view(rows, -1, GROUP)
    energy = _row_sum(weight.double().square().transpose(1, 2))  # [rows, groups]
    liked = _liked_scales(weight, energy)
    scale = _super_scales(liked, energy)
    start = torch.where(liked > 0, liked.double() / scale.double()[:, None], 0).round().clamp(0, MAX_LOCAL).long()
    product = _bf16(start * scale[:, None])
    every = [torch.full((rows,), p) for p in range(len(pairs))]
    gain = torch.stack([_gains(weight, product, tables[p], lists[p]) for p in every], 1)  # [rows, pairs, groups]
    pair = _row_sum(gain.mT).argmax(1)  # the first of equals
    table, lists = tables[pair], lists[pair]
    local = _best_locals(weight, scale, start, gain[torch.arange(rows), pair], table, lists)
    product, values = _bf16(local * scale[:, None]), table[:, :, :4].to(torch.int32)
    codes = torch.stack([_nearest_bytes(weight[r], product[r], values[r]) for r in range(rows)])
    return fields(codes, local.to(torch.uint8), scale, pair, pairs)
