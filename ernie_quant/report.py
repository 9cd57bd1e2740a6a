"""What a run did to every tensor: report.json, and tables for people."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ernie_quant.measure import Difference

if TYPE_CHECKING:
    from ernie_quant.plan import Step

FILENAME, PAGE = "report.json", "report.html"
PLOTS_FOLDER, PLOTS = "plots", ("error-heatmap.png", "error-histogram.png", "bytes-by-role.png")  # beside the page
WORST = 5
LAYERS_SHOWN = 8


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the result. `squared_error` and `squared_norm` add up over tensors, `rel_error` does not."""

    name: str
    role: str
    codec: str
    shape: tuple[int, ...]
    bytes: int  # stored
    bits_per_weight: float
    rel_error: float
    sqnr_db: float | None
    max_abs_error: float
    squared_error: float
    squared_norm: float
    sources: tuple[str, ...]
    crc32: str  # of its stored tensors: `writer.joint_crc32`

    @staticmethod
    def of(step: Step, difference: Difference, crc32: str) -> TensorReport:
        """The row for a finished step."""
        return TensorReport(
            step.name, step.role, step.codec.describe(), step.spec.shape, step.nbytes,
            step.codec.bits_per_weight(step.spec), difference.rel_error, difference.sqnr_db, difference.largest,
            difference.error, difference.total, step.sources, crc32,
        )  # fmt: skip

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> TensorReport:
        """The inverse of `to_json`. Raises TypeError or KeyError."""
        values = {f.name: row[f.name] for f in fields(TensorReport)}
        return TensorReport(**values | {"shape": tuple(row["shape"]), "sources": tuple(row["sources"])})

    def to_json(self) -> dict[str, Any]:
        """As in report.json."""
        return asdict(self)


@dataclass(frozen=True)
class Total:
    """Several tensors together."""

    tensors: int
    weights: int
    bytes: int
    rel_error: float
    worst: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


def total(rows: Sequence[TensorReport]) -> Total:
    """Sums over tensors; the relative error is that of all their weights as one vector."""
    norm = sum(r.squared_norm for r in rows)
    error = sum(r.squared_error for r in rows)
    weights = sum(_numel(r.shape) for r in rows)
    worst = max((r.rel_error for r in rows), default=0.0)
    return Total(len(rows), weights, sum(r.bytes for r in rows), error / norm if norm else 0.0, worst)


def _numel(shape: Iterable[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def to_json(rows: Sequence[TensorReport], header: Mapping[str, Any]) -> str:
    """report.json: one tensor a line, so that two reports can be compared with diff."""
    by_role = {role: asdict(total(group)) for role, group in _grouped(rows, lambda r: r.role).items()}
    head = json.dumps({**header, "roles": by_role}, indent=2, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join("    " + json.dumps(r.to_json(), ensure_ascii=False, allow_nan=False) for r in rows)
    return f'{head[:-2]},\n  "tensors": [\n{lines}\n  ]\n}}\n'


def _grouped(rows: Sequence[TensorReport], key: Callable[[TensorReport], str]) -> dict[str, list[TensorReport]]:
    groups: dict[str, list[TensorReport]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def layer_of(name: str) -> str:
    """`layer 3`, or what else the tensor belongs to."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return f"layer {found[1]}" if found else name.split(".")[1] if name.startswith(("model.", "ernie.")) else name.split(".")[0]


HEAD = ("tensors", "GB", "bits/weight", "rel. error", "worst")


def tables(rows: Sequence[TensorReport]) -> str:
    """By role, by layer (the worst ones) and the worst tensors, as text."""
    text = [table(("role", *HEAD), [_line(role, group) for role, group in _grouped(rows, lambda r: r.role).items()])]
    changed = [r for r in rows if r.codec != "kept"]
    if not changed:
        return text[0]
    layers = sorted(_grouped(changed, lambda r: layer_of(r.name)).items(), key=lambda item: -total(item[1]).rel_error)
    note = f" ({LAYERS_SHOWN} of {len(layers)}; all are in {FILENAME})" if len(layers) > LAYERS_SHOWN else ""
    lines = [_line(layer, group) for layer, group in layers[:LAYERS_SHOWN]]
    text += [f"\nLayers, worst first{note}:", table(("layer", *HEAD), lines)]
    worst = sorted(changed, key=lambda r: -r.rel_error)[:WORST]
    lines = [(r.name, r.codec, _error(r.rel_error), _decibels(r.sqnr_db), f"{r.max_abs_error:.4g}") for r in worst]
    text += ["\nWorst tensors:", table(("tensor", "codec", "rel. error", "SQNR dB", "max |error|"), lines)]
    return "\n".join(text)


def _line(name: str, group: Sequence[TensorReport]) -> tuple[str, ...]:
    t = total(group)
    changed = any(r.codec != "kept" for r in group)
    errors = (_error(t.rel_error), _error(t.worst)) if changed else ("-", "-")
    return (name, str(t.tensors), f"{t.bytes / 1e9:.3f}", f"{t.bits_per_weight:.3f}", *errors)


def _error(value: float) -> str:
    return f"{value:.5f}" if value >= 1e-3 else f"{value:.2e}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns under their heads; numbers to the right."""
    widths = [max(len(str(line[i])) for line in [head, *lines]) for i in range(len(head))]
    numeric = [bool(lines) and all(re.fullmatch(r"[-\d.,e+]+", str(line[i])) for line in lines) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([row(head), row(["-" * w for w in widths]), *(row(line) for line in lines)])
