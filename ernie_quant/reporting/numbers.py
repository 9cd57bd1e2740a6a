"""Numbers as the page holds them: a few significant digits, and none that JSON has no word for."""

from __future__ import annotations

import math
from collections.abc import Sequence

DIGITS = 4  # significant ones


def short(value: float, digits: int = DIGITS) -> float:
    """The finite number with so many significant digits; a whole one without a point."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and rounded < 1e15 else rounded


def shown(value: float | None, digits: int = DIGITS) -> float | None:
    """`short` of a finite number, or None."""
    return short(value, digits) if value is not None and math.isfinite(value) else None


def in_runs(layers: Sequence[int]) -> str:
    """`1-7, 9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
