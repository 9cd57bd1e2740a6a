"""The main pictures of a report as PNG, for a model card. The same report and the same matplotlib give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.errors import ErnieQuantError, OutputError, line_of
from ernie_quant.report.page import Place, Report, Written, put
from ernie_quant.report.rows import PLOTS, TensorReport, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DPI = 150
LEAST_RANGE = 1.2  # of a colour scale, from least to largest; or noise would look like a difference
MOST_PANELS, MOST_STRIPS, MOST_CELLS, BINS = 12, 12, 2_000_000, 60
LEAST_ERROR = 1e-30  # below, a logarithm says nothing
ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "up_gate_proj", "gate_proj", "up_proj", "down_proj")
FORMULA = "relative error ||W - W'||² / ||W||²"
KEPT_COLOR, BEFORE_COLOR, COLOR = "#dfe3e8", "#8a93a0", "#0072b2"
# strings are a stranger's: no formulas in them, and nothing of the user's own settings
STYLE = {"text.parse_math": False, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": DPI}
# rows, columns -> relative error; None where a tensor is kept
Panel = Mapping[tuple[int, str | int], float | None]


def draw(found: Report) -> dict[str, bytes]:
    """Name -> PNG; those of errors only if there are any. Raises ErnieQuantError."""
    try:
        import matplotlib.style
    except ImportError:
        raise ErnieQuantError("--plots needs matplotlib: pip install ernie-quant[plots]") from None
    drawings: tuple[Callable[[Report], Figure | None], ...] = (heatmap, histogram, bytes_by_role)
    with matplotlib.style.context(STYLE, after_reset=True):
        figures = {name: draw(found) for name, draw in zip(PLOTS, drawings, strict=True)}
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def write_plots(found: Report, folder: Path) -> list[Written]:
    """Write the pictures into `folder`. Raises ErnieQuantError."""
    pictures = draw(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    return [put(folder / name, data) for name, data in pictures.items()]


def _png(figure: Figure) -> bytes:
    import warnings

    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers between two bounds of a logarithmic axis, and how they are written."""
    decades = math.log10(high / low)
    if decades >= 0.9:
        steps = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [float(f"{step}e{power}") for power in powers for step in steps]
    else:
        rough = (high - low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m for m in (1, 2, 5, 10) if m * unit >= rough) * unit
        found = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    inside = [value for value in found if low <= value <= high]
    return inside, [f"{value:.4g}" for value in inside]


# --- errors by place --------------------------------------------------------------------------------------------------


def panels(rows: Sequence[TensorReport]) -> dict[str, Panel]:
    """Title -> layer by expert, of each role and projection that lost something; layer by projection without experts."""
    placed = [(row, place) for row in rows if (place := Place.of(row.name)).layer is not None and len(row.shape) == 2]
    found: dict[str, dict[tuple[int, str | int], float | None]] = {}
    for row, place in placed:
        if place.expert is not None and place.layer is not None:
            cell = (place.ids[place.layer], place.ids[place.expert])
            found.setdefault(f"{line_of(row.role)}, {line_of(place.projection)}", {})[cell] = _error(row)
    found = {title: cells for title, cells in found.items() if any(cells.values()) and _cells(cells) <= MOST_CELLS}
    if found:
        return dict(list(found.items())[:MOST_PANELS])
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


def heatmap(found: Report) -> Figure | None:
    """Relative error by layer and expert, or by layer and projection; one colour scale for all panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    shown = panels(found.rows)
    errors = [error for panel in shown.values() for error in panel.values() if error is not None]
    if not errors:
        return None
    middle = math.sqrt(min(errors) * max(errors))
    reach = max(math.sqrt(LEAST_RANGE), math.sqrt(max(errors) / min(errors)))
    norm = LogNorm(middle / reach, middle * reach)
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    figure = _figure(3.6 * across + 1.4, 3.4 * down + 0.5)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, (title, panel) in zip(axes, shown.items(), strict=False):
        _draw_panel(axis, title, panel, norm)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(axes), label=FORMULA)
    bar.minorticks_off()
    marks, labels = _ticks(middle / reach, middle * reach)
    bar.set_ticks(marks, labels=labels)
    figure.suptitle("\n".join([line_of(found.name), *_codec_lines(found.rows)]), fontsize=10)
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


# --- how they are spread ----------------------------------------------------------------------------------------------


def _strips(rows: Sequence[TensorReport]) -> Iterator[tuple[str, list[float]]]:
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.changed and row.rel_error > LEAST_ERROR:
            groups.setdefault((row.role, row.codec), []).append(row.rel_error)
    for (role, codec), errors in sorted(groups.items(), key=lambda item: -len(item[1]))[:MOST_STRIPS]:
        yield f"{line_of(role)}, {line_of(codec)} ({len(errors)})", errors


def histogram(found: Report) -> Figure | None:
    """Tensors by relative error: a row of bars for each role and codec over one logarithmic axis."""
    import numpy as np

    strips = list(_strips(found.rows))
    if not strips:
        return None
    low, high = min(min(errors) for _, errors in strips), max(max(errors) for _, errors in strips)
    edges = np.geomspace(low / 1.02, high * 1.02, BINS + 1)
    figure = _figure(8, 0.9 * len(strips) + 1)
    axes = figure.subplots(len(strips), 1, sharex=True, squeeze=False).flatten()
    for axis, (title, errors) in zip(axes, strips, strict=True):
        axis.hist(errors, bins=edges, color=COLOR, edgecolor="white", linewidth=0.5)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set_title(title, loc="left", fontsize=9)
    axes[-1].set_xticks(*_ticks(edges[0], edges[-1]))
    axes[-1].set_xlabel(FORMULA)
    figure.suptitle(line_of(found.name), fontsize=10)
    return figure


# --- bytes ------------------------------------------------------------------------------------------------------------


def bytes_by_role(found: Report) -> Figure:
    """A bar of each role as it is stored, in the outline of the same weights in bf16."""
    groups: dict[str, list[TensorReport]] = {}
    for row in found.rows:
        groups.setdefault(row.role, []).append(row)
    sums = sorted(((total(rows), role) for role, rows in groups.items()), key=lambda pair: pair[0].bytes)[-MOST_STRIPS:]
    unit, name = _unit(sums[-1][0].bytes)
    figure = _figure(8, 0.34 * len(sums) + 1.1)
    axis = figure.subplots()
    labels = [line_of(role) for _, role in sums]
    places = list(range(len(sums)))
    axis.barh(places, [2 * t.weights / unit for t, _ in sums], color="none", edgecolor=BEFORE_COLOR, label="in bf16")
    axis.barh(places, [t.bytes / unit for t, _ in sums], color=COLOR, label="stored")
    for place, (t, _) in zip(places, sums, strict=True):
        text = f"{_size(t.bytes)}, {t.bits_per_weight:.3g} bits"
        axis.annotate(
            text, (max(t.bytes, 2 * t.weights) / unit, place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(places, labels)
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.set_xlabel(name)
    axis.legend(loc="lower right", frameon=False)
    everything = total(found.rows)
    title = f"{line_of(found.name)}: {_size(everything.bytes)}, {everything.bits_per_weight:.3g} bits per weight"
    figure.suptitle(title, fontsize=10)
    return figure


def _unit(nbytes: int) -> tuple[float, str]:
    return (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB") if nbytes >= 1e6 else (1e3, "kB")


def _size(nbytes: int) -> str:
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:.3g} {name}" if nbytes < 1000 * unit else f"{nbytes / unit:.0f} {name}"
