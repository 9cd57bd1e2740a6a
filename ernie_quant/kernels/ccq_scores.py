"""How much of a row WINT2's 256 bytes explain at given scales: the inner loop of the search.

All 256 bytes are scored for every 4 weights. The four coordinates lie in planes, so that one instruction works on 8 or 16
vectors and 5 of them make a score: 360 million weights per second and scale with AVX-512, 200 with AVX2. A table from 16^4
cells to the 3.6 bytes that can be nearest did 200 with either: its loads and branches do not vectorize.
"""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

F = np.float32


# "contract" allows fused multiply-add. It changes no bit: every intermediate is exact in float32, see ccq_reference.
@compiled(fastmath={"contract"})
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


@compiled()
def gains(planes, scale, table, scratch, out):  # type: ignore[no-untyped-def]
    """Half of what the codes explain of each group of a row: planes f32 [4, in/4], scale f32 [groups] -> out f64 [groups]."""
    place(planes, scale, scratch)
    placed_gains(scale, table, scratch, out)


@compiled()
def place(planes, scale, scratch):  # type: ignore[no-untyped-def]
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


@compiled()
def placed_gains(scale, table, scratch, out):  # type: ignore[no-untyped-def]
    """The gains of a row that `place` has put into scratch at this scale -> out f64 [groups]."""
    best = scratch[1]
    best_scores(scratch[2:], table, best)
    for g in range(scale.size):
        total = 0.0
        for v in range(16 * g, 16 * g + 16):
            total += best[v]
        out[g] = total * (np.float64(scale[g]) * np.float64(scale[g]))
