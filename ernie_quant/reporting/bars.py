"""The pictures made of bars: how the errors are spread, and how many bytes each role takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ernie_quant.errors import line_of
from ernie_quant.reporting.drawing import FORMULA, LEAST_ERROR, new_figure, ticks
from ernie_quant.reporting.rows import TensorReport, grouped, total
from ernie_quant.reporting.saved import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_STRIPS, BINS = 12, 60
BEFORE_COLOR, COLOR = "#8a93a0", "#0072b2"


def _strips(rows: Sequence[TensorReport]) -> Iterator[tuple[str, list[float]]]:
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.changed and row.rel_error > LEAST_ERROR:
            groups.setdefault((row.role, row.codec), []).append(row.rel_error)
    for (role, codec), errors in sorted(groups.items(), key=lambda item: -len(item[1]))[:MOST_STRIPS]:
        yield f"{line_of(role)}, {line_of(codec)} ({len(errors)})", errors


def histogram(report: Report) -> Figure | None:
    """Tensors by relative error: a row of bars for each role and codec over one logarithmic axis."""
    import numpy as np

    strips = list(_strips(report.rows))
    if not strips:
        return None
    low, high = min(min(errors) for _, errors in strips), max(max(errors) for _, errors in strips)
    edges = np.geomspace(low / 1.02, high * 1.02, BINS + 1)
    figure = new_figure(8, 0.9 * len(strips) + 1)
    axes = figure.subplots(len(strips), 1, sharex=True, squeeze=False).flatten()
    for axis, (title, errors) in zip(axes, strips, strict=True):
        axis.hist(errors, bins=edges, color=COLOR, edgecolor="white", linewidth=0.5)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set_title(title, loc="left", fontsize=9)
    axes[-1].set_xticks(*ticks(edges[0], edges[-1]))
    axes[-1].set_xlabel(FORMULA)
    figure.suptitle(line_of(report.name), fontsize=10)
    return figure


def bytes_by_role(report: Report) -> Figure:
    """A bar of each role as it is stored, in the outline of the same weights in bf16."""
    groups = grouped(report.rows, lambda row: row.role)
    sums = sorted(((total(rows), role) for role, rows in groups.items()), key=lambda pair: pair[0].bytes)[-MOST_STRIPS:]
    unit, name = _unit(sums[-1][0].bytes)
    figure = new_figure(8, 0.34 * len(sums) + 1.1)
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
    everything = total(report.rows)
    title = f"{line_of(report.name)}: {_size(everything.bytes)}, {everything.bits_per_weight:.3g} bits per weight"
    figure.suptitle(title, fontsize=10)
    return figure


def _unit(nbytes: int) -> tuple[float, str]:
    return (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB") if nbytes >= 1e6 else (1e3, "kB")


def _size(nbytes: int) -> str:
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:.3g} {name}" if nbytes < 1000 * unit else f"{nbytes / unit:.0f} {name}"
