"""A report as tables for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ernie_quant.errors import line_of
from ernie_quant.reporting.rows import FILENAME, TensorReport, grouped, layer_of, output_error, total

WORST = 5
LAYERS_SHOWN = 8


HEAD = ("tensors", "GB", "bits/weight", "rel. error", "worst")


@dataclass(frozen=True)
class Table:
    """One of a report: what it is of, and its cells."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def tables(rows: Sequence[TensorReport], drift: Mapping[int, float] | None = None) -> str:
    """By role, by layer (the worst ones) and the worst tensors, as text; `drift`: that after each layer."""
    found = [(f"\n{part.title}:\n" if part.title else "") + table(part.head, part.lines) for part in parts(rows, drift)]
    if drift and len(found) > 1:
        found.append("\n" + textwrap.fill(after_layers(drift), 110))
    return "\n".join(found)


def after_layers(drift: Mapping[int, float]) -> str:
    """A sentence."""
    return f"Drift of the hidden states after each layer: {', '.join(f'{n}: {_error(value)}' for n, value in drift.items())}"


def parts(rows: Sequence[TensorReport], drift: Mapping[int, float] | None = None) -> list[Table]:
    """The tables; where text was run through the model, errors of outputs stand beside those of weights."""
    by_text = output_error(rows) is not None
    head = (*HEAD, *(("output error",) if by_text else ()))
    of_layers = {f"layer {layer}": value for layer, value in (drift or {}).items()}
    by_role = grouped(rows, lambda r: r.role)
    found = [Table("", ("role", *head), tuple(_line(role, group, by_text) for role, group in by_role.items()))]
    changed = [r for r in rows if r.changed]
    if not changed:
        return found
    layers = sorted(grouped(changed, lambda r: layer_of(r.name)).items(), key=lambda item: -total(item[1]).rel_error)
    note = f" ({LAYERS_SHOWN} of {len(layers)}; all are in {FILENAME})" if len(layers) > LAYERS_SHOWN else ""
    lines = [_line(layer, group, by_text, of_layers) for layer, group in layers[:LAYERS_SHOWN]]
    found.append(Table(f"Layers, worst first{note}", ("layer", *head, *(("drift",) if of_layers else ())), tuple(lines)))
    worst = sorted(changed, key=lambda r: -r.rel_error)[:WORST]
    lines = [
        (
            r.name,
            r.codec,
            _error(r.rel_error),
            _decibels(r.sqnr_db),
            f"{r.max_abs_error:.4g}",
            *([_part(r.output_error)] * by_text),
        )
        for r in worst
    ]
    of_worst = ("tensor", "codec", "rel. error", "SQNR dB", "max |error|", *head[len(HEAD) :])
    return [*found, Table("Worst tensors", of_worst, tuple(lines))]


def _part(value: float | None) -> str:
    return "-" if value is None else _error(value)


def _line(
    name: str, group: Sequence[TensorReport], by_text: bool = False, drift: Mapping[str, float] | None = None
) -> tuple[str, ...]:  # fmt: skip
    t = total(group)
    lossy = any(r.changed or r.rounded for r in group)
    errors = (_error(t.rel_error), _error(t.worst)) if lossy else ("-", "-")
    more = [_part(output_error(group))] * by_text + ([_part(drift.get(name))] if drift else [])
    return (name, str(t.tensors), f"{t.bytes / 1e9:.3f}", f"{t.bits_per_weight:.3f}", *errors, *more)


def _error(value: float) -> str:
    return f"{value:.5f}" if value >= 1e-3 else f"{value:.2e}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as Markdown, whatever strangers have called their tensors."""
    rows = [head, ["---:" if numeric else "---" for numeric in _numeric(head, lines)], *lines]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows)


def _escaped(cell: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", line_of(cell))


def _numeric(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[bool]:
    return [bool(lines) and all(re.fullmatch(r"[-\d.,e+]+", str(line[i])) for line in lines) for i in range(len(head))]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns under their heads; numbers to the right."""
    widths = [max(len(str(line[i])) for line in [head, *lines]) for i in range(len(head))]
    numeric = _numeric(head, lines)

    def row(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([row(head), row(["-" * w for w in widths]), *(row(line) for line in lines)])
