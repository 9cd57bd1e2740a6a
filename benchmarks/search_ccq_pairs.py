"""Find the pairs (code_scale, code_zp) of `ernie_quant.codecs.ccq.CANDIDATES`: the same list each time.

python benchmarks/search_ccq_pairs.py [COUNT]        # a minute on one core; 16 pairs unless told

c = floor(byte * code_scale + code_zp + 0.5) is a lattice of 256 codes in [0, 32767]; how well its overlapping windows fill
the space of 4 weights depends on code_scale down to 1/256 and jumps about with code_zp, so they are tried, not derived.

1. Sample: code_scale = m / 256 from 104 to 127 (outside it nothing came near), 24 whole code_zp each where the codes fit;
   squared error on 4096 Gaussian vectors at two scales.
2. The best 4000 again on 16384 other vectors at three scales; the best 1500 stay.
3. For each of them the error of 192 Gaussian and 192 Student-t (5 degrees) rows of 2048, every group of 64 at the best of
   five scales around its rms.
4. Greedy: add the pair that lowers the mean over rows of the least error among the chosen most, the two halves weighted
   alike. Which lattice fits a row best is mostly chance, so a list of 16 gains where one "best" pair cannot.

Multiples of 1/256 and whole code_zp make byte * code_scale + code_zp + 0.5 a multiple of 1/256 below 2^15: 23 bits, exact
in float32 however it is added, so fused and separate multiply-add agree for every byte.
"""

import argparse

import numba as nb
import numpy as np

from ernie_quant.kernels.ccq_reference import GROUP, score_tables

ROWS, WIDTH = 192, 2048
RATIOS = np.array([0.8, 0.9, 1.0, 1.1, 1.22])  # of rms / 15.5, the scale that fits a Gaussian group best
SCALES = np.arange(104 * 256, 127 * 256) / 256
ZPS_PER_SCALE, SECOND_ROUND, THIRD_ROUND = 24, 4000, 1500

Array = np.ndarray


# "contract" allows fused multiply-add. It changes no bit: every intermediate is exact in float32, see ccq_reference.
@nb.njit(nogil=True, cache=True, fastmath={"contract"})
def best_scores(x, table, best):
    """Largest `x.p - |p|^2 / 2` over the 256 bytes: x f32 [4, n], table f32 [256, 5] -> best f32 [n]."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    for i in range(best.size):
        best[i] = np.float32(-3e38)
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
def gains(planes, scale, table, scratch, out):
    """Half of what all 256 bytes explain of each group: planes f32 [4, in/4], scale f32 [groups] -> out f64 [groups]."""
    best, x = scratch[0], scratch[1:]
    for g in range(scale.size):
        for v in range(16 * g, 16 * g + 16):
            for i in range(4):
                x[i, v] = np.rint(planes[i, v] * (np.float32(512) / scale[g])) * np.float32(1 / 512)
    best_scores(x, table, best)
    for g in range(scale.size):
        out[g] = best[16 * g : 16 * g + 16].sum() * np.float64(scale[g]) ** 2


@nb.njit(nogil=True, cache=True)
def errors(tables, planes, scales, energy):
    """Relative error [tables, rows]: planes f32 [rows, 4, in/4], scales f32 [rows, ratios, groups], energy f64 [rows]."""
    rows, ratios, groups = scales.shape
    out = np.empty((len(tables), rows))
    scratch, gain, best = np.empty((5, planes.shape[2]), np.float32), np.empty(groups), np.empty(groups)
    for t in range(len(tables)):
        for row in range(rows):
            best[:] = 0
            for k in range(ratios):
                gains(planes[row], scales[row, k], tables[t], scratch, gain)
                best = np.maximum(best, gain)
            out[t, row] = 1 - 2 * best.sum() / energy[row]
    return out


def row_errors(tables: Array, weight: Array) -> Array:
    """Relative error f64 [tables, rows] of `weight` f64 [rows, in] at the best of RATIOS per group."""
    rows = len(weight)
    rms = np.sqrt(np.square(weight.reshape(rows, -1, GROUP)).mean(2))
    scales = (rms[:, None, :] / 15.5 * RATIOS[:, None]).astype(np.float32)
    planes = np.ascontiguousarray(weight.reshape(rows, -1, 4).transpose(0, 2, 1).astype(np.float32))
    return errors(tables, planes, scales, np.square(weight).sum(1))


def vector_errors(tables: Array, vectors: Array, steps: tuple[float, ...]) -> Array:
    """Relative error f64 [tables] of `vectors` f64 [4, n] at the best of one common scale 1 / step."""
    best = np.empty(vectors.shape[1], np.float32)
    energy, out = np.square(vectors).sum(), np.ones(len(tables))
    for step in steps:
        x = (vectors * step).astype(np.float32)
        for t, table in enumerate(tables):
            best_scores(x, table, best)
            out[t] = min(out[t], 1 - 2 * best.sum(dtype=np.float64) / (energy * step * step))
    return out


def tables_of(pairs: Array) -> Array:
    """Score tables f32 [pairs, 256, 5] of pairs f64 [pairs, 2]."""
    return score_tables([tuple(pair) for pair in pairs.tolist()]).numpy()


def both_kinds(rng: np.random.Generator) -> tuple[Array, Array]:
    """Gaussian and Student-t rows."""
    return rng.standard_normal((ROWS, WIDTH)), rng.standard_t(5, (ROWS, WIDTH))


def promising(rng: np.random.Generator) -> Array:
    """Steps 1 and 2: pairs f64 [THIRD_ROUND, 2]."""
    scale = np.repeat(SCALES, ZPS_PER_SCALE)
    zp = np.floor(rng.random(len(scale)) * (32767 - np.ceil(255 * scale)))
    pairs = np.unique(np.stack([scale, zp], 1), axis=0)
    error = vector_errors(tables_of(pairs), rng.standard_normal((4, 4096)), (15, 16.5))
    pairs = pairs[np.argsort(error, kind="stable")[:SECOND_ROUND]]
    error = vector_errors(tables_of(pairs), rng.standard_normal((4, 16384)), (14.5, 15.5, 16.5))
    order = np.argsort(error, kind="stable")[:THIRD_ROUND]
    print(f"# {len(scale)} pairs; one scale for all, Gaussian: best {error[order[0]]:.4f}, last kept {error[order[-1]]:.4f}")
    return pairs[order]


def main() -> None:
    """Search and print the list as Python, with the errors that its first n reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=16, metavar="COUNT")
    count = parser.parse_args().count
    rng = np.random.default_rng(64)
    pairs = promising(rng)
    halves = [row_errors(tables_of(pairs), rows) for rows in both_kinds(rng)]
    relative = np.concatenate([half / half.mean(1).min() for half in halves], 1)
    chosen, least = [], np.full(relative.shape[1], np.inf)
    while len(chosen) < count:
        chosen.append(np.minimum(relative, least).mean(1).argmin())
        least = np.minimum(relative[chosen[-1]], least)
    fresh = [row_errors(tables_of(pairs[chosen]), rows) for rows in both_kinds(rng)]
    for n, index in enumerate(chosen, 1):
        found, new = ([e.min(0).mean() for e in es] for es in ([h[chosen[:n]] for h in halves], [f[:n] for f in fresh]))
        note = f"gaussian {found[0]:.4f} student-t {found[1]:.4f}; rows not searched on: {new[0]:.4f} {new[1]:.4f}"
        print(f"    ({pairs[index][0]}, {pairs[index][1]}),  # {note}")


if __name__ == "__main__":
    main()
