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
and clipped to +-128 (four times what a code reaches; the scales tried are not so small). Then every product and every
partial sum is a multiple of 1/512 below 2^15: float32 holds it exactly, and any order of summation, fused or not, on any
machine, gives the same bits. The bytes that are stored are chosen by the distance to the decoded bf16 weights in float64,
without grid and clipping: the nearest of all 256, the lower one of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Pair = tuple[float, float]  # code_scale, code_zp

GROUP = 64  # inputs per local scale
SHIFTS = (9, 6, 3, 0)
MAX_LOCAL = 15
# Peaks of a row. The smallest super scale is peak / (8 * 19 * 59), and 512 / scale must be finite; 2^-104 < 5e-32.
# The largest decoded weight is below 5 * peak, and must not overflow bf16.
MIN_PEAK, MAX_PEAK = 2.0**-104, 2.0**120

PROBES = 6  # scales tried per group to learn which it likes
FINALISTS = 3  # pairs per row whose local scales are searched
LOCAL_STEPS = (-1, 1, -2, 2)  # around the local scale; with the first pair only the first two
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
    """f32 [pairs, 256, 5]: the four values of each byte and minus half their squared norm, what `gains` multiplies by."""
    scale, zp = torch.tensor(pairs, dtype=torch.float32).T
    values = code_values(scale, zp).float()
    return torch.cat([values, -0.5 * values.square().sum(2, keepdim=True)], 2)


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
    table = torch.tensor(pairs, dtype=torch.float32)
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


def _gains(weight: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Half of what the codes explain of each group: f32 [rows, groups, 64], [rows, groups], [rows or 1, 256, 5] -> f64."""
    rows, groups, _ = weight.shape
    inverse = torch.where(scale > 0, 512 / scale, 0)
    x = (weight * inverse[:, :, None]).clamp(-65536, 65536).round() / 512
    x = torch.cat([x.view(rows, -1, 4), torch.ones(rows, groups * 16, 1)], 2)
    best = (x @ table.mT.expand(rows, -1, -1)).amax(2)  # exact in float32, see above
    return best.double().view(rows, groups, 16).sum(2) * scale.double().square()


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over dim 1, first to last: float64 sums that the kernel must meet bit for bit have a fixed order."""
    total = torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        total = total + x[:, i]
    return total


def _liked_scales(weight: torch.Tensor, energy: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The best of PROBES scales for each group: f32 [rows, groups, 64] -> f32 [rows, groups]."""
    rms = (energy / GROUP).sqrt()
    low = rms / 19
    high = torch.maximum(rms / 11, weight.abs().amax(2).double() / 31)
    best, liked = torch.zeros_like(low), _bf16(low.float())
    for i in range(PROBES):
        scale = _bf16((low + (high - low) * (i / (PROBES - 1))).float())
        gain = _gains(weight, scale, table)
        liked = torch.where(gain > best, scale, liked)
        best = torch.maximum(gain, best)
    return liked


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
    weight: torch.Tensor,
    scale: torch.Tensor,
    around: torch.Tensor,
    gain: torch.Tensor,
    steps: tuple[int, ...],
    table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best local scale of each group near `around`, whose gain is known: int64 and f64 [rows, groups]; no gain is 0."""
    local, best = torch.where(gain > 0, around, 0), gain.clamp(min=0)
    for step in steps:
        trial = (around + step).clamp(0, MAX_LOCAL)
        gain = _gains(weight, _bf16(trial * scale[:, None]), table)
        local = torch.where(gain > best, trial, local)
        best = torch.maximum(gain, best)
    return local, best


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
    weight = weight.view(rows, -1, GROUP)
    energy = _row_sum(weight.double().square().transpose(1, 2))  # [rows, groups]
    liked = _liked_scales(weight, energy, tables[:1])
    scale = _super_scales(liked, energy)
    local = torch.where(liked > 0, liked.double() / scale.double()[:, None], 0).round().clamp(0, MAX_LOCAL).long()
    gain = _gains(weight, _bf16(local * scale[:, None]), tables[:1])
    local, gain = _best_locals(weight, scale, local, gain, LOCAL_STEPS[:2], tables[:1])

    # every pair at these local scales, then the local scales again for the best of them
    product = _bf16(local * scale[:, None])
    gain = torch.stack([gain, *(_gains(weight, product, table[None]) for table in tables[1:])], 1)  # [rows, pairs, groups]
    order = _row_sum(gain.mT).argsort(dim=1, descending=True, stable=True)
    best, pair, best_local = torch.full((rows,), -1.0, dtype=torch.float64), order[:, 0], local
    for choice in order[:, :FINALISTS].T:
        known = gain[torch.arange(rows), choice]
        trial, explained = _best_locals(weight, scale, local, known, LOCAL_STEPS, tables[choice])
        explained = _row_sum(explained)
        pair = torch.where(explained > best, choice, pair)
        best_local = torch.where((explained > best)[:, None], trial, best_local)
        best = torch.maximum(explained, best)

    product, values = _bf16(best_local * scale[:, None]), tables[pair, :, :4].to(torch.int32)
    codes = torch.stack([_nearest_bytes(weight[r], product[r], values[r]) for r in range(rows)])
    return fields(codes, best_local.to(torch.uint8), scale, pair, pairs)
