"""WINT2's bytes at given scales: the nearest to a weight, and what they decode to."""

from __future__ import annotations

import numpy as np

from ernie_quant.kernels._compiled import compiled

F = np.float32


@compiled()
def round_bf16(x):  # type: ignore[no-untyped-def]
    """f32 [n] rounded to bf16 in place, half to even; x is finite."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        bits[i] = np.uint32((bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))


@compiled()
def nearest_bytes(planes, super_scale, local, table, codes):  # type: ignore[no-untyped-def]
    """The bytes whose decoded weights are nearest: planes f32 [4, in/4], table f32 [256, 5] -> codes uint8 [in/4]."""
    product, decoded = np.empty(1, F), np.empty(256 * 4, F)
    nearest, byte, w = np.empty(16), np.empty(16, np.int64), np.empty((4, 16))
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for g in range(local.size):
        product[0] = F(local[g]) * super_scale
        round_bf16(product)
        for k in range(256):
            for i in range(4):
                decoded[4 * k + i] = table[k, i] * product[0]
        round_bf16(decoded)
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


@compiled()
def nearest_rows(weight, tables, pair, local_scale, super_scale, codes):  # type: ignore[no-untyped-def]
    """`nearest_bytes` of every row of a weight f32 [out, in] in stored order, with tables[pair[row]]: codes uint8 [out, in/4]."""
    rows, width = weight.shape
    planes, local = np.empty((4, width // 4), F), np.empty(width // 64, np.int64)
    for row in range(rows):
        for v in range(width // 4):
            for i in range(4):
                planes[i, v] = weight[row, 4 * v + i]
        for g in range(local.size):
            local[g] = local_scale[row, g]
        nearest_bytes(planes, super_scale[row], local, tables[pair[row]], codes[row])


@compiled()
def decode_rows(codes, local_scale, super_scale, code_scale, code_zp, out):  # type: ignore[no-untyped-def]
    """What bytes and scales decode to: out uint32 [out, in/2], two bf16 each; 2j and 2j + 1 stay neighbours in stored order."""
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
            round_bf16(scale)
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
