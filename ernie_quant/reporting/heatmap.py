"""The picture of errors by place: layer by expert, or layer by projection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ernie_quant.errors import line_of
from ernie_quant.reporting.drawing import FORMULA, LEAST_ERROR, new_figure, ticks
from ernie_quant.reporting.place import Place
from ernie_quant.reporting.rows import TensorReport
from ernie_quant.reporting.saved import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LEAST_RANGE = 1.2  # of a colour scale, from least to largest; or noise would look like a difference
MOST_PANELS, MOST_CELLS = 12, 2_000_000
ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "up_gate_proj", "gate_proj", "up_proj", "down_proj")
KEPT_COLOR = "#dfe3e8"
# rows, columns -> relative error; None where a tensor is kept
Panel = Mapping[tuple[int, str | int], float | None]


def panels(rows: Sequence[TensorReport]) -> dict[str, Panel]:
    """Title -> layer by expert, of each role and projection that lost something; layer by projection without experts."""
    placed = [(row, place) for row in rows if (place := Place.of(row.name)).layer is not None and len(row.shape) == 2]
    by_expert: dict[str, dict[tuple[int, str | int], float | None]] = {}
    for row, place in placed:
        if place.expert is not None and place.layer is not None:
            cell = (place.ids[place.layer], place.ids[place.expert])
            by_expert.setdefault(f"{line_of(row.role)}, {line_of(place.projection)}", {})[cell] = _error(row)
    by_expert = {title: cells for title, cells in by_expert.items() if any(cells.values()) and _cells(cells) <= MOST_CELLS}
    if by_expert:
        return dict(list(by_expert.items())[:MOST_PANELS])
    lossy = {place.projection for row, place in placed if row.changed}
    linears: dict[tuple[int, str | int], float | None] = {}
    for row, place in placed:
        if place.projection in lossy and place.layer is not None and place.block == "layer":
            linears[place.ids[place.layer], place.projection] = _error(row)
    return {"linears": linears} if _cells(linears) <= MOST_CELLS else {}


def _cells(panel: Panel) -> int:
    return len({y for y, _ in panel}) * len({x for _, x in panel})


def _error(row: TensorReport) -> float | None:
    return None if not row.changed else max(row.rel_error, LEAST_ERROR)


def heatmap(report: Report) -> Figure | None:
    """Relative error by layer and expert, or by layer and projection; one colour scale for all panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    shown = panels(report.rows)
    errors = [error for panel in shown.values() for error in panel.values() if error is not None]
    if not errors:
        return None
    middle = math.sqrt(min(errors) * max(errors))
    reach = max(math.sqrt(LEAST_RANGE), math.sqrt(max(errors) / min(errors)))
    norm = LogNorm(middle / reach, middle * reach)
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(3.6 * across + 1.4, 3.4 * down + 0.5)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, (title, panel) in zip(axes, shown.items(), strict=False):
        _draw_panel(axis, title, panel, norm)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(axes), label=FORMULA)
    bar.minorticks_off()
    marks, labels = ticks(middle / reach, middle * reach)
    bar.set_ticks(marks, labels=labels)
    figure.suptitle("\n".join([line_of(report.name), *_codec_lines(report.rows)]), fontsize=10)
    return figure


def _draw_panel(axis: Any, title: str, panel: Panel, norm: Any) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap

    layers = sorted({layer for layer, _ in panel})
    columns = sorted({column for _, column in panel}, key=_column_order)
    at = {column: x for x, column in enumerate(columns)}, {layer: y for y, layer in enumerate(layers)}
    errors = np.full((len(layers), len(columns)), np.nan)
    kept = errors.copy()
    for (layer, column), error in panel.items():
        (kept if error is None else errors)[at[1][layer], at[0][column]] = 1 if error is None else error
    options = {"aspect": "auto", "interpolation": "nearest", "origin": "upper"}
    axis.imshow(kept, cmap=ListedColormap([KEPT_COLOR]), **options)
    axis.imshow(errors, cmap="viridis", norm=norm, **options)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("layer")
    step = max(1, math.ceil(len(layers) / 12))
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    words = any(isinstance(column, str) for column in columns)
    step = max(1, math.ceil(len(columns) / (40 if words else 8)))
    names = [line_of(str(column)).removeprefix("self_attn.").removeprefix("mlp.") for column in columns]
    axis.set_xticks(range(0, len(columns), step), names[::step], rotation=60 if words else 0)
    if not words:
        axis.set_xlabel("expert")


def _column_order(column: str | int) -> tuple[bool, int, str]:
    """Experts by number; projections in the order in which a layer computes them, those of shared experts last."""
    if isinstance(column, int):
        return False, column, ""
    place = next((i for i, end in enumerate(ORDER) if column.endswith(end)), len(ORDER))
    return "shared" in column, place, column


def _codec_lines(rows: Sequence[TensorReport]) -> list[str]:
    """Which layers' experts (linears, where there are none) have which codec, if there are several."""
    layers: dict[str, set[int]] = {}
    places = [(row, Place.of(row.name)) for row in rows if row.changed]
    experts = any(place.expert is not None for _, place in places)
    for row, place in places:
        if place.layer is not None and (place.expert is not None) == experts:
            layers.setdefault(row.codec, set()).add(place.ids[place.layer])
    if len(layers) == 1:
        return [line_of(codec) for codec in layers]
    return [f"{line_of(codec)}: layers {_ranges(sorted(numbers))}" for codec, numbers in layers.items()][:6]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-6, 9`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
