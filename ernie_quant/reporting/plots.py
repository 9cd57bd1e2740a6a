"""The main pictures of a report as PNG, for a model card. The same report and the same matplotlib give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_quant.errors import NeedsError, OutputError
from ernie_quant.needs import install_extra
from ernie_quant.reporting.bars import bytes_by_role, histogram
from ernie_quant.reporting.drawing import STYLE, png
from ernie_quant.reporting.heatmap import heatmap
from ernie_quant.reporting.page import Written, put
from ernie_quant.reporting.rows import PLOTS
from ernie_quant.reporting.saved import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(report: Report) -> dict[str, bytes]:
    """Name -> PNG; those of errors only if there are any. Raises NeedsError."""
    try:
        import matplotlib.style
    except ImportError:
        raise NeedsError(f"--plots needs matplotlib: {install_extra('plots')}") from None
    drawings: tuple[Callable[[Report], Figure | None], ...] = (heatmap, histogram, bytes_by_role)
    with matplotlib.style.context(STYLE, after_reset=True):
        figures = {name: draw(report) for name, draw in zip(PLOTS, drawings, strict=True)}
        return {name: png(figure) for name, figure in figures.items() if figure is not None}


def write_plots(report: Report, folder: Path) -> list[Written]:
    """Write the pictures into `folder`. Raises ErnieQuantError."""
    pictures = draw(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    return [put(folder / name, data) for name, data in pictures.items()]
