"""The search of WINT2's bytes and scales and its decoder, compiled; the formulas and the reasons are in ccq_reference.

All 256 bytes are scored for every 4 weights. The four coordinates lie in planes, so that one instruction works on 8 or 16
vectors and 5 of them make a score: 360 million weights per second and scale with AVX-512, 200 with AVX2. A table from 16^4
cells to the 3.6 bytes that can be nearest did 200 with either: its loads and branches do not vectorize.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba as nb
import numpy as np
import torch

from ernie_quant.kernels.ccq_reference import (
    FACTORS,
    FINALISTS,
    GROUP,
    LOCAL_STEPS,
    PROBES,
    Pair,
    encodable,
    fields,
    score_tables,
    stored_order,
)

F = np.float32


def encode(weight: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """The fields of a bf16 or f32 weight [out, in], in logical order, with the best of `pairs` for each row.

    codes uint8 [out, in/4] in stored order, local_scale uint8 [out, in/64] in [0, 15], super_scale bf16 [out], code_scale
    and code_zp f32 [out]. Rows that hold NaN, infinity or more than 2^120, or whose largest magnitude is below 2^-104, get
    zero scales. No GIL is held and no threads are started: the caller encodes slabs of rows in parallel.
    """
    stored = encodable(weight)
    rows, width = stored.shape
    codes = torch.empty((rows, width // 4), dtype=torch.uint8)
    local_scale = torch.empty((rows, width // GROUP), dtype=torch.uint8)
    super_scale, pair = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    tables, factors, steps = score_tables(pairs).numpy(), np.array(FACTORS), np.array(LOCAL_STEPS)
    _encode(
        stored.numpy(),
        tables,
        factors,
        steps,
        PROBES,
        FINALISTS,
        codes.numpy(),
        local_scale.numpy(),
        super_scale.numpy(),
        pair.numpy(),
    )
    return fields(codes, local_scale, super_scale, pair, pairs)


def decode(encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights that the kernel multiplies by: bf16 [out, in], in logical order."""
    codes, local_scale = encoded["codes"].contiguous(), encoded["local_scale"].contiguous()
    out = torch.empty((codes.shape[0], 4 * codes.shape[1]), dtype=torch.bfloat16)
    _decode(
        codes.numpy(),
        local_scale.numpy(),
        encoded["super_scale"].float().numpy(),
        encoded["code_scale"].contiguous().numpy(),
        encoded["code_zp"].contiguous().numpy(),
        out.view(torch.uint32).numpy(),
    )
    return out


def recode(weight: torch.Tensor, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bytes nearest to a weight [out, in] in logical order, at the scales of `encoded`: uint8 [out, in/4]."""
    stored = weight.float().reshape(len(weight), -1, GROUP)[:, :, stored_order()].flatten(1)
    scales = np.stack([encoded["code_scale"].numpy(), encoded["code_zp"].numpy()], 1)
    pairs, pair = np.unique(scales, axis=0, return_inverse=True)
    codes = torch.empty((stored.shape[0], stored.shape[1] // 4), dtype=torch.uint8)
    tables = score_tables([(float(scale), float(zp)) for scale, zp in pairs]).numpy()
    local, top = encoded["local_scale"].contiguous().numpy(), encoded["super_scale"].float().numpy()
    _recode(stored.numpy(), tables, pair.reshape(-1), local, top, codes.numpy())
    return codes


# "contract" allows fused multiply-add. It changes no bit: every intermediate is exact in float32, see above.
@nb.njit(nogil=True, cache=True, fastmath={"contract"})
def best_scores(x, table, best):  # type: ignore[no-untyped-def]
    """Largest `x.p - |p|^2 / 2` over the 256 bytes: x f32 [4, n], table f32 [256, 5] -> best f32 [n]."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for i in range(best.size):
        best[i] = F(-3e38)
    for b in range(0, 256, 4):  # four at a time, so that x is loaded once for 20 operations
        p0, p1, p2, p3, ph = table[b]
        q0, q1, q2, q3, qh = table[b + 1]
        r0, r1, r2, r3, rh = table[b + 2]
        s0, s1, s2, s3, sh = table[b + 3]
        for i in range(best.size):
            a0, a1, a2, a3 = x0[i], x1[i], x2[i], x3[i]
            p = a0 * p0 + (a1 * p1 + (a2 * p2 + (a3 * p3 + ph)))
            q = a0 * q0 + (a1 * q1 + (a2 * q2 + (a3 * q3 + qh)))
            r = a0 * r0 + (a1 * r1 + (a2 * r2 + (a3 * r3 + rh)))
            s = a0 * s0 + (a1 * s1 + (a2 * s2 + (a3 * s3 + sh)))
            p = p if p > q else q
            r = r if r > s else s
            p = p if p > r else r
            best[i] = p if p > best[i] else best[i]


@nb.njit(nogil=True, cache=True)
def gains(planes, scale, table, scratch, out):  # type: ignore[no-untyped-def]
    """Half of what the codes explain of each group of a row: planes f32 [4, in/4], scale f32 [groups] -> out f64 [groups]."""
    _place(planes, scale, scratch)
    _placed_gains(scale, table, scratch, out)


@nb.njit(nogil=True, cache=True)
def _place(planes, scale, scratch):  # type: ignore[no-untyped-def]
    """x = planes / scale on the grid of 1/512: -> scratch[2:], scratch f32 [6, in/4]."""
    inverse = scratch[0]
    for g in range(scale.size):
        one = F(512) / scale[g] if scale[g] > 0 else F(0)
        for v in range(16 * g, 16 * g + 16):
            inverse[v] = one
    for i in range(4):
        w, x = planes[i], scratch[2 + i]
        for v in range(inverse.size):
            y = w[v] * inverse[v]
            y = y if y < F(65536) else F(65536)
            y = y if y > F(-65536) else F(-65536)
            x[v] = np.rint(y) * F(1 / 512)


@nb.njit(nogil=True, cache=True)
def _placed_gains(scale, table, scratch, out):  # type: ignore[no-untyped-def]
    best = scratch[1]
    best_scores(scratch[2:], table, best)
    for g in range(scale.size):
        total = 0.0
        for v in range(16 * g, 16 * g + 16):
            total += best[v]
        out[g] = total * (np.float64(scale[g]) * np.float64(scale[g]))


@nb.njit(nogil=True, cache=True)
def _round_bf16(x):  # type: ignore[no-untyped-def]
    """f32 [n] rounded to bf16 in place, half to even; x is finite."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        bits[i] = np.uint32((bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))


@nb.njit(nogil=True, cache=True)
def _multiply(local, super_scale, scale):  # type: ignore[no-untyped-def]
    """scale f32 [groups] = bf16(local * super_scale), local int64 [groups]."""
    for g in range(local.size):
        scale[g] = F(local[g]) * super_scale
    _round_bf16(scale)


@nb.njit(nogil=True, cache=True)
def _liked_scales(planes, energy, probes, table, scratch, liked, gain):  # type: ignore[no-untyped-def]
    """The best of `probes` scales for each group, into liked f32 [groups], and its energy |w|^2, into energy f64 [groups]."""
    groups = liked.size
    low, high, best, scale = np.empty(groups), np.empty(groups), np.zeros(groups), np.empty(groups, F)
    for g in range(groups):
        energy[g], peak = 0.0, 0.0
        for v in range(16 * g, 16 * g + 16):
            for i in range(4):
                w = np.float64(planes[i, v])
                energy[g] += w * w
                peak = max(peak, abs(w))
        rms = np.sqrt(energy[g] / 64)
        low[g] = rms / 19
        high[g] = max(rms / 11, peak / 31)
        liked[g] = low[g]
    _round_bf16(liked)
    for i in range(probes):
        for g in range(groups):
            scale[g] = low[g] + (high[g] - low[g]) * (i / (probes - 1))
        _round_bf16(scale)
        gains(planes, scale, table, scratch, gain)
        for g in range(groups):
            if gain[g] > best[g]:
                best[g], liked[g] = gain[g], scale[g]


@nb.njit(nogil=True, cache=True)
def _super_scale(liked, energy, factors):  # type: ignore[no-untyped-def]
    """The f32 (rounded to bf16) whose multiples 1 to 15 lie nearest to the liked scales."""
    loudest = np.float64(0)
    for g in range(liked.size):
        loudest = max(loudest, np.float64(liked[g]))
    found, least, ideal = F(0), np.inf, np.empty(1, F)
    for factor in factors:
        ideal[0] = loudest * factor
        _round_bf16(ideal)
        multiple = np.float64(ideal[0])
        loss = 0.0
        for g in range(liked.size):
            if liked[g] > 0:
                like = np.float64(liked[g])
                miss = min(max(np.rint(like / multiple), 1.0), 15.0) * multiple / like - 1
                loss += energy[g] * min(miss * miss, 1.0)
        if loss < least:
            least, found = loss, ideal[0]
    return found


@nb.njit(nogil=True, cache=True)
def _best_locals(planes, super_scale, around, known, steps, table, scratch, local, best_gain):  # type: ignore[no-untyped-def]
    """Local scales near `around` (gain `known`), into local int64 [groups] and best_gain f64 [groups]; returns its sum."""
    groups = around.size
    trial, scale, gain = np.empty(groups, np.int64), np.empty(groups, F), np.empty(groups)
    for g in range(groups):
        best_gain[g] = max(known[g], 0.0)
        local[g] = around[g] if known[g] > 0 else 0
    for step in steps:
        for g in range(groups):
            trial[g] = min(max(around[g] + step, 0), 15)
        _multiply(trial, super_scale, scale)
        gains(planes, scale, table, scratch, gain)
        for g in range(groups):
            if gain[g] > best_gain[g]:
                best_gain[g], local[g] = gain[g], trial[g]
    total = 0.0
    for g in range(groups):
        total += best_gain[g]
    return total


@nb.njit(nogil=True, cache=True)
def _nearest_bytes(planes, super_scale, local, table, codes):  # type: ignore[no-untyped-def]
    """The bytes whose decoded weights are nearest: planes f32 [4, in/4], table f32 [256, 5] -> codes uint8 [in/4]."""
    product, decoded = np.empty(1, F), np.empty(256 * 4, F)
    nearest, byte, w = np.empty(16), np.empty(16, np.int64), np.empty((4, 16))
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for g in range(local.size):
        product[0] = F(local[g]) * super_scale
        _round_bf16(product)
        for k in range(256):
            for i in range(4):
                decoded[4 * k + i] = table[k, i] * product[0]
        _round_bf16(decoded)
        for v in range(16):
            for i in range(4):
                w[i, v] = planes[i, 16 * g + v]
            nearest[v] = np.inf
        for b in range(0, 256, 2):
            d = decoded[4 * b : 4 * b + 8]
            p0, p1, p2, p3 = np.float64(d[0]), np.float64(d[1]), np.float64(d[2]), np.float64(d[3])
            q0, q1, q2, q3 = np.float64(d[4]), np.float64(d[5]), np.float64(d[6]), np.float64(d[7])
            for v in range(16):
                e0, e1, e2, e3 = w0[v] - p0, w1[v] - p1, w2[v] - p2, w3[v] - p3
                p = e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3
                e0, e1, e2, e3 = w0[v] - q0, w1[v] - q1, w2[v] - q2, w3[v] - q3
                q = e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3
                least = q if q < p else p
                which = b + 1 if q < p else b
                byte[v] = which if least < nearest[v] else byte[v]
                nearest[v] = least if least < nearest[v] else nearest[v]
        for v in range(16):
            codes[16 * g + v] = byte[v]


@nb.njit(nogil=True, cache=True)
def _recode(weight, tables, pair, local_scale, super_scale, codes):  # type: ignore[no-untyped-def]
    rows, width = weight.shape
    planes, local = np.empty((4, width // 4), F), np.empty(width // 64, np.int64)
    for row in range(rows):
        for v in range(width // 4):
            for i in range(4):
                planes[i, v] = weight[row, 4 * v + i]
        for g in range(local.size):
            local[g] = local_scale[row, g]
        _nearest_bytes(planes, super_scale[row], local, tables[pair[row]], codes[row])


@nb.njit(nogil=True, cache=True)
def _encode(weight, tables, factors, steps, probes, finalists, codes, local_scale, super_scale, pair):  # type: ignore[no-untyped-def]
    rows, width = weight.shape
    groups, pairs = width // 64, len(tables)
    planes, scratch = np.empty((4, width // 4), F), np.empty((6, width // 4), F)
    energy, liked, scale = np.empty(groups), np.empty(groups, F), np.empty(groups, F)
    gain, best_gain, total = np.empty((pairs, groups)), np.empty(groups), np.empty(pairs)
    start, local = np.empty(groups, np.int64), np.empty(groups, np.int64)
    for row in range(rows):
        for v in range(width // 4):
            for i in range(4):
                planes[i, v] = weight[row, 4 * v + i]
        _liked_scales(planes, energy, probes, tables[0], scratch, liked, best_gain)
        top = _super_scale(liked, energy, factors)
        for g in range(groups):
            k = np.float64(liked[g]) / np.float64(top) if liked[g] > 0 else 0.0
            local[g] = np.int64(min(np.rint(k), 15.0))
        _multiply(local, top, scale)
        gains(planes, scale, tables[0], scratch, best_gain)
        _best_locals(planes, top, local, best_gain, steps[:2], tables[0], scratch, start, gain[0])

        # every pair at these local scales, then the local scales again for the best of them
        _multiply(start, top, scale)
        _place(planes, scale, scratch)
        for p in range(pairs):
            if p > 0:
                _placed_gains(scale, tables[p], scratch, gain[p])
            total[p] = 0
            for g in range(groups):
                total[p] += gain[p, g]
        best = -1.0
        for _ in range(min(finalists, pairs)):
            choice = np.argmax(total)  # the first of equals
            total[choice] = -np.inf
            explained = _best_locals(planes, top, start, gain[choice], steps, tables[choice], scratch, local, best_gain)
            if explained > best:
                best, pair[row] = explained, choice
                for g in range(groups):
                    local_scale[row, g] = local[g]
        for g in range(groups):
            local[g] = local_scale[row, g]
        super_scale[row] = top
        _nearest_bytes(planes, top, local, tables[pair[row]], codes[row])


@nb.njit(nogil=True, cache=True)
def _decode(codes, local_scale, super_scale, code_scale, code_zp, out):  # type: ignore[no-untyped-def]
    """-> out uint32 [out, in/2], two bf16 each: inputs 2j and 2j + 1 stay neighbours in stored order."""
    rows, groups = local_scale.shape
    table, windows = np.empty(256, np.uint32), np.empty(16, np.uint32)  # of four signed bytes each
    values, scale, product = windows.view(np.int8), np.empty(1, F), np.empty(64, F)
    pairs, bits = np.empty(32, np.uint32), product.view(np.uint32)
    for r in range(rows):
        for b in range(256):
            c = np.int32(np.floor(F(np.float64(b) * np.float64(code_scale[r]) + np.float64(code_zp[r])) + F(0.5)))
            word = ((c >> 9) & 63) | ((c >> 6) & 63) << 8 | ((c >> 3) & 63) << 16 | (c & 63) << 24
            table[b] = np.uint32(word)
        for g in range(groups):
            scale[0] = F(local_scale[r, g]) * super_scale[r]
            _round_bf16(scale)
            for j in range(16):
                windows[j] = table[codes[r, 16 * g + j]]
            for j in range(64):
                product[j] = F(values[j] - 32) * scale[0]
            for j in range(64):
                bits[j] = (bits[j] + np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            for j in range(32):
                pairs[j] = bits[2 * j] | bits[2 * j + 1] << np.uint32(16)
            for a in range(4):
                for b in range(8):
                    out[r, 32 * g + 4 * b + a] = pairs[8 * a + b]
