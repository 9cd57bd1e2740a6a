"""Numbers as the page holds them: a few significant digits, and none that JSON has no word for."""

from __future__ import annotations

import math

DIGITS = 4  # significant ones


def short(value: float, digits: int = DIGITS) -> float:
    """The finite number with so many significant digits; a whole one without a point."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and rounded < 1e15 else rounded


def shown(value: float | None, digits: int = DIGITS) -> float | None:
    """`short` of a finite number, or None."""
    return short(value, digits) if value is not None and math.isfinite(value) else None
