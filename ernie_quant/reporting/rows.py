"""What a run did to every tensor: the rows of report.json, and their sums."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ernie_quant.codecs._rounded import ROUNDED
from ernie_quant.codecs.keep import KEPT

FIRST = 5  # of many names
FILENAME, PAGE, COMPARISON = "report.json", "report.html", "comparison.html"
PLOTS_FOLDER, PLOTS = "plots", ("error-heatmap.png", "error-histogram.png", "bytes-by-role.png")  # beside the page


FITTED = "kept, fitted"  # in its dtype, and changed by calibration
SOMETIMES = {"not_finite": 0, "only_zeros": False, "output_error": None, "fitted": False, "calibration_tokens": None,
             "as_stored": False}  # fmt: skip
# columns that stand in report.json where they are not this


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
    not_finite: int = 0  # elements of a kept tensor that are NaN or infinity; in report.json where there are any
    only_zeros: bool = False  # of a weight; in report.json where it is so
    output_error: float | None = None  # of calibration: part of its output's energy lost on tokens for judging
    fitted: bool = False  # it aims at more than the source's weight
    calibration_tokens: int | None = None  # tokens of its inputs that were looked at
    as_stored: bool = False  # codes and scales are those of a quantized source, and nothing was measured

    @property
    def changed(self) -> bool:
        """Was it quantized, or fitted, when this result was made?"""
        return not self.as_stored and self.codec not in (KEPT, *ROUNDED.values())

    @property
    def plain(self) -> bool:
        """Is it stored as a plain tensor?"""
        return self.codec in (KEPT, *ROUNDED.values(), FITTED)

    @property
    def rounded(self) -> bool:
        """Was it kept, but for its dtype?"""
        return self.codec in ROUNDED.values()

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> TensorReport:
        """The inverse of `to_json`. Raises TypeError or KeyError."""
        values = {f.name: row[f.name] for f in fields(TensorReport) if f.name in row or f.name not in SOMETIMES}
        return TensorReport(**values | {"shape": tuple(row["shape"]), "sources": tuple(row["sources"])})

    def to_json(self) -> dict[str, Any]:
        """As in report.json."""
        return {key: value for key, value in asdict(self).items() if key not in SOMETIMES or value != SOMETIMES[key]}


@dataclass(frozen=True)
class ShardResult:
    """A finished weight file, and a row for every weight in it."""

    filename: str
    nbytes: int
    sha256: str
    reports: tuple[TensorReport, ...]

    def to_json(self) -> dict[str, Any]:
        """What is remembered of it."""
        return {"bytes": self.nbytes, "sha256": self.sha256, "reports": [row.to_json() for row in self.reports]}

    @staticmethod
    def from_json(filename: str, table: Mapping[str, Any]) -> ShardResult:
        """The inverse of `to_json`. Raises TypeError or KeyError."""
        rows = tuple(TensorReport.from_json(row) for row in table["reports"])
        return ShardResult(filename, table["bytes"], table["sha256"], rows)


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
    weights = sum(math.prod(r.shape) for r in rows)
    worst = max((r.rel_error for r in rows), default=0.0)
    return Total(len(rows), weights, sum(r.bytes for r in rows), error / norm if norm else 0.0, worst)


def output_error(rows: Sequence[TensorReport]) -> float | None:
    """Mean of the tensors that calibration has measured, each counted by its weights; None where there are none."""
    measured = [(row.output_error, math.prod(row.shape)) for row in rows if row.output_error is not None]
    weights = sum(count for _, count in measured)
    return sum(error * count for error, count in measured) / weights if weights else None


def to_json(rows: Sequence[TensorReport], header: Mapping[str, Any]) -> str:
    """report.json: one tensor a line, so that two reports can be compared with diff."""
    by_role = {role: _sums(group) for role, group in grouped(rows, lambda r: r.role).items()}
    head = json.dumps({**header, "roles": by_role}, indent=2, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join("    " + json.dumps(r.to_json(), ensure_ascii=False, allow_nan=False) for r in rows)
    return f'{head[:-2]},\n  "tensors": [\n{lines}\n  ]\n}}\n'


def _sums(rows: Sequence[TensorReport]) -> dict[str, Any]:
    of_outputs = output_error(rows)
    return asdict(total(rows)) | ({} if of_outputs is None else {"output_error": of_outputs})


def odd_values(rows: Sequence[TensorReport]) -> list[str]:
    """Notes about weights that no sound model has, by name."""
    infinite = dict.fromkeys(f"{r.name} ({r.not_finite} of {math.prod(r.shape)})" for r in rows if r.not_finite)
    zeros = dict.fromkeys(r.name for r in rows if r.only_zeros)
    return [
        f"{len(found)} {'weight holds' if len(found) == 1 else 'weights hold'} {what}: {some(found)}"
        for found, what in ((infinite, "NaN or infinity"), (zeros, "nothing but zeros"))
        if found
    ]


def some(names: Collection[str]) -> str:
    """The first of `names`, and that there are more."""
    return ", ".join([*list(names)[:FIRST], *([f"… and {len(names) - FIRST} more"] if len(names) > FIRST else [])])


def grouped(rows: Sequence[TensorReport], key: Callable[[TensorReport], str]) -> dict[str, list[TensorReport]]:
    """Rows by what `key` says of them, in order."""
    groups: dict[str, list[TensorReport]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def layer_of(name: str) -> str:
    """`layer 3`, or what else the tensor belongs to."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return f"layer {found[1]}" if found else name.split(".")[1] if name.startswith(("model.", "ernie.")) else name.split(".")[0]
