"""Every row of a report as CSV (RFC 4180, UTF-8): text in quotes, numbers without, nothing where there is none.

Names are a stranger's, and a spreadsheet runs what begins with `=`, `+`, `-` or `@`. Such text gets an apostrophe before it, also
after a comma, a semicolon or a bar, where a program that splits there would begin a cell. What does not print is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ernie_quant.reporting import expected, usual
from ernie_quant.reporting.page import Written, put
from ernie_quant.reporting.rows import TensorReport
from ernie_quant.reporting.saved import Report

Cell = str | int | float | None

HEAD = (
    "name", "role", "codec", "shape", "bytes", "bits_per_weight", "rel_error", "sqnr_db", "max_abs_error", "gaussian_error",
    "outlier", "output_error", "calibration_tokens", "fitted", "not_finite", "only_zeros", "sources", "crc32",
)  # fmt: skip
# and their wide forms, which some programs take for the same
FORMULA = re.compile("(^|[,;|])(?=[\\s\"']*[=+\\-@\uff1d\uff0b\uff0d\uff20])")


def write(report: Report, path: Path) -> Written:
    """Write the rows. Raises OutputError."""
    return put(path, render(report))


def render(report: Report) -> bytes:
    """The file: a line of heads, then one of each tensor, in the order of report.json."""
    return "".join(f"{','.join(map(cell, line))}\r\n" for line in _lines(report)).encode()


def _lines(report: Report) -> Iterator[tuple[Cell, ...]]:
    yield HEAD
    of_codecs = usual.by_codec(report.rows)
    for row in report.rows:
        yield (
            row.name, row.role, row.codec, "x".join(map(str, row.shape)), row.bytes, row.bits_per_weight, row.rel_error,
            row.sqnr_db, row.max_abs_error, _gaussian(row), usual.mark(row, of_codecs), row.output_error, row.calibration_tokens,
            "yes" if row.fitted else "", row.not_finite, "yes" if row.only_zeros else "", " ".join(row.sources), row.crc32,
        )  # fmt: skip


def _gaussian(row: TensorReport) -> float | None:
    found = expected.of(row.codec, row.shape) if row.changed and not row.fitted else None
    return None if found is None else float(f"{found:.4g}")


def cell(value: Cell) -> str:
    """A value as it stands between commas."""
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        return repr(value)
    text = value if value.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    harmless = FORMULA.sub(lambda found: found[1] + "'", text)
    return '"' + harmless.replace('"', '""') + '"'
