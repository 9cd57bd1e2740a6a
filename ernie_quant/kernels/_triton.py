"""What Triton kernels share: how they are launched, and arithmetic that gives the bits of the CPU's kernels.

Three things would give other bits, and none of them is left to a default. Contraction of a * b + c to one rounding:
`enable_fp_fusion` is off for every launch. Division by a reciprocal: `tl.div_rn`, never `/`. Conversions that a GPU's
instructions round, or saturate, in their own way: bf16 and float8 are made by integer arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

jit: Callable[[Callable[..., Any]], Any] = triton.jit


OPTIONS = {"enable_fp_fusion": False}  # of every kernel
_LOCK = threading.Lock()  # the first launch of a kernel compiles it, which is one thread's work; others take microseconds


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4) -> None:
    """Run a kernel on the device, and the stream, of the first tensor among its arguments; an empty grid is nothing."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    # Triton launches on the current device, wherever the pointers lead
    with _LOCK, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, num_warps=num_warps, **OPTIONS)


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def unrolled(length: int) -> int:
    """Steps of a loop of that length that are written out, without a rest: so many loads are under way at a time."""
    return next(n for n in (8, 4, 2, 1) if length % n == 0)


@jit
def round_bf16(x):  # type: ignore[no-untyped-def]
    """float32 rounded to what bf16 can hold, half to even; x is finite."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@jit
def upper_half(x):  # type: ignore[no-untyped-def]
    """The bits of a bf16, as int16, of a float32 that one can hold."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.int16)


@jit
def nearest(x, low, high):  # type: ignore[no-untyped-def]
    """x clipped and rounded to an integer, half to even: 1.5 * 2**23 leaves no bits for fractions."""
    return (tl.minimum(tl.maximum(x, low), high) + 12582912.0) - 12582912.0


@jit
def folded(lanes):  # type: ignore[no-untyped-def]
    """[n, m, 16] -> [n, m, 1]: halves, one on the other, four times. A sum of two numbers has no order that could matter."""
    return _halved(_halved(_halved(_halved(lanes, 8), 4), 2), 1)


@jit
def _halved(lanes, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.reshape(lanes, (lanes.shape[0], lanes.shape[1], 2, HALF)), 2)


ROWS = 128  # of a program


def sums_of_rows(parts: torch.Tensor) -> torch.Tensor:
    """f64 [2, rows] of f64 [2, groups, rows]: the groups of a row are added in order."""
    _, groups, rows = parts.shape
    sums = torch.empty((2, rows), dtype=torch.float64, device=parts.device)
    launch(_sums_of_rows, (cdiv(rows, ROWS), 2), parts, sums, groups, rows, ROWS)
    return sums


@jit
def _sums_of_rows(parts, sums, groups, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, which = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    at, there = which * groups * rows + row, row < rows
    total = tl.zeros((ROWS,), tl.float64)
    for _ in range(0, groups):
        total += tl.load(parts + at, mask=there, other=0.0)
        at += rows
    tl.store(sums + which * rows + row, total, mask=there)


def totals(sums: torch.Tensor, largest: torch.Tensor) -> tuple[float, float, float]:
    """||W - W'||^2 and ||W||^2 of their parts f64 [2, n], added exactly, and max |W - W'| of its parts."""
    error, energy = sums.cpu().numpy()
    return math.fsum(error), math.fsum(energy), float(largest.max()) if largest.numel() else 0.0


@jit
def lost(x, w, error, energy, most):  # type: ignore[no-untyped-def]
    """Sums of (x - w)^2 and x^2, in float64, and the largest |x - w|, with one more of each; as `_registers.lost`."""
    exact = x.to(tl.float64)
    miss = exact - w.to(tl.float64)
    return error + miss * miss, energy + exact * exact, tl.maximum(most, tl.abs(x - w))
