"""Transposing small blocks of 16-bit and 8-bit elements in 64-bit registers: three times faster than one by one."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

U = np.uint64
# every second element of 8, 16 and 32 bits
EVEN8, EVEN16, EVEN32 = U(0x00FF00FF00FF00FF), U(0x0000FFFF0000FFFF), U(0x00000000FFFFFFFF)


@compiled(inline="always")
def _swap(a, b, shift, even):  # type: ignore[no-untyped-def]
    """Exchange the upper elements of each pair in `a` with the lower ones in `b`."""
    x = ((a >> shift) ^ b) & even
    return a ^ (x << shift), b ^ x


@compiled()
def load_16(rows, first, n, column, group, out):  # type: ignore[no-untyped-def]
    """out[j] = rows[first : first + n, column + j], for `group` j: 16-bit elements, four to a word.

    `rows` uint64 [rows, columns / 4], `out` uint64 [group, lanes / 4]; n, column and group are multiples of 4.
    """
    start = column // 4
    for i in range(n // 4):
        r = first + 4 * i
        row0, row1, row2, row3 = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        for c in range(group // 4):
            a, b, d, e = row0[start + c], row1[start + c], row2[start + c], row3[start + c]
            a, b = _swap(a, b, U(16), EVEN16)
            d, e = _swap(d, e, U(16), EVEN16)
            out[4 * c, i], out[4 * c + 2, i] = _swap(a, d, U(32), EVEN32)
            out[4 * c + 1, i], out[4 * c + 3, i] = _swap(b, e, U(32), EVEN32)


@compiled()
def store_8(lanes, first, n, column, group, out):  # type: ignore[no-untyped-def]
    """out[first : first + n, column + j] = lanes[j], for `group` j: 8-bit elements, eight to a word.

    `lanes` uint64 [group, lanes / 8], `out` uint64 [rows, columns / 8]; n, column and group are multiples of 8.
    """
    start = column // 8
    for c in range(group // 8):
        for i in range(n // 8):
            a0, a1, a2, a3 = lanes[8 * c, i], lanes[8 * c + 1, i], lanes[8 * c + 2, i], lanes[8 * c + 3, i]
            a4, a5, a6, a7 = lanes[8 * c + 4, i], lanes[8 * c + 5, i], lanes[8 * c + 6, i], lanes[8 * c + 7, i]
            a0, a1 = _swap(a0, a1, U(8), EVEN8)
            a2, a3 = _swap(a2, a3, U(8), EVEN8)
            a4, a5 = _swap(a4, a5, U(8), EVEN8)
            a6, a7 = _swap(a6, a7, U(8), EVEN8)
            a0, a2 = _swap(a0, a2, U(16), EVEN16)
            a1, a3 = _swap(a1, a3, U(16), EVEN16)
            a4, a6 = _swap(a4, a6, U(16), EVEN16)
            a5, a7 = _swap(a5, a7, U(16), EVEN16)
            r = first + 8 * i
            out[r, start + c], out[r + 4, start + c] = _swap(a0, a4, U(32), EVEN32)
            out[r + 1, start + c], out[r + 5, start + c] = _swap(a1, a5, U(32), EVEN32)
            out[r + 2, start + c], out[r + 6, start + c] = _swap(a2, a6, U(32), EVEN32)
            out[r + 3, start + c], out[r + 7, start + c] = _swap(a3, a7, U(32), EVEN32)
