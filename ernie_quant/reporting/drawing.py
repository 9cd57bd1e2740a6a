"""What the pictures have in common: their style, empty figures, marks of a logarithmic axis, and PNG."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DPI = 150
LEAST_ERROR = 1e-30  # below, a logarithm says nothing
FORMULA = "relative error ||W - W'||² / ||W||²"
# strings are a stranger's: no formulas in them, and nothing of the user's own settings
STYLE = {"text.parse_math": False, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": DPI}


def png(figure: Figure) -> bytes:
    """The picture as a file: the same figure and the same matplotlib, the same bytes."""
    import warnings

    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty one of so many inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers between two bounds of a logarithmic axis, and how they are written."""
    decades = math.log10(high / low)
    if decades >= 0.9:
        steps = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [float(f"{step}e{power}") for power in powers for step in steps]
    else:
        rough = (high - low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m for m in (1, 2, 5, 10) if m * unit >= rough) * unit
        marks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    inside = [value for value in marks if low <= value <= high]
    return inside, [f"{value:.4g}" for value in inside]
