"""`difference` for GPUs: a lane is a column and goes through its rows in order, as the CPU does."""

from __future__ import annotations

import torch
import triton.language as tl

from ernie_quant.kernels._triton import cdiv, jit, launch, totals, unrolled

COLUMNS = 64  # of a program


def squares(weight: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float, float]:
    """`difference.squares`: ||W - W'||^2, ||W||^2 and max |W - W'| of two bf16 or f32 matrices."""
    return totals(*of_columns(weight, decoded))


def of_columns(weight: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f64 [2, in]: ||W - W'||^2 and ||W||^2 of each column; f32 [in]: max |W - W'|."""
    rows, columns = weight.shape
    sums = torch.empty((2, columns), dtype=torch.float64, device=weight.device)
    largest = torch.empty(columns, dtype=torch.float32, device=weight.device)
    launch(
        _squares, (cdiv(columns, COLUMNS),), weight.contiguous(), decoded.contiguous(), sums, largest, rows, columns,
        COLUMNS, unrolled(rows),
    )  # fmt: skip
    return sums, largest


@jit
def _squares(left, right, sums, largest, rows, columns, COLUMNS: tl.constexpr, UNROLLED: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at, there = column.to(tl.int64), column < columns
    error, total = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
    top = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(0, rows, UNROLLED):
        for _ in tl.static_range(UNROLLED):
            x = tl.load(left + at, mask=there, other=0.0).to(tl.float32)
            y = tl.load(right + at, mask=there, other=0.0).to(tl.float32)
            wide = x.to(tl.float64)
            d = wide - y.to(tl.float64)
            error += d * d
            total += wide * wide
            top = tl.maximum(top, tl.abs(x - y))
            at += columns
    tl.store(sums + column, error, mask=there)
    tl.store(sums + columns + column, total, mask=there)
    tl.store(largest + column, top, mask=there)
