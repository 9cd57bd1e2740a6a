"""What report.json and the manifest of a finished result say, if it is what a run writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant.errors import OutputError
from ernie_quant.jsonio import read_object
from ernie_quant.paths import MANIFEST
from ernie_quant.reporting.rows import FILENAME, TensorReport

MOST = 2**60  # of bytes or weights, and 10**100 of a sum: above, a report is not believed


@dataclass(frozen=True, repr=False)
class Report:
    """What report.json and the manifest of a result say."""

    name: str  # of the folder
    rows: tuple[TensorReport, ...]
    header: Mapping[str, Any]
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Report of {self.name}: {len(self.rows)} tensors>"


def read(out: Path) -> Report:
    """The report of a finished result. Raises OutputError or CheckpointError."""
    for file in (MANIFEST, FILENAME):
        if not (out / file).is_file():
            raise OutputError(f"{out}: has no {file}; a report is made from the folder of a finished result")
    header, manifest = read_object(out / FILENAME), read_object(out / MANIFEST)
    tensors = header.pop("tensors", None)
    if not isinstance(tensors, list) or not tensors:
        raise OutputError(f"{out / FILENAME}: lists no tensors")
    rows = []
    for number, value in enumerate(tensors, 1):
        try:
            rows.append(_believed(TensorReport.from_json(value)))
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{out / FILENAME}: tensor {number} is not as a run writes it: {error}") from None
    return Report(out.resolve().name, tuple(rows), header, manifest)


def _believed(row: TensorReport) -> TensorReport:
    """The row, if its values have the types and sizes that a run gives them. Raises ValueError."""
    for key in ("name", "role", "codec"):
        if not isinstance(getattr(row, key), str):
            raise ValueError(f"{key} is no text")
    wholes = (row.bytes, *row.shape)
    if len(row.shape) > 8 or any(type(n) is not int or not 0 <= n <= MOST for n in wholes) or math.prod(row.shape) > MOST:
        raise ValueError("bytes or shape are no such numbers")
    if type(row.not_finite) is not int or not 0 <= row.not_finite <= MOST or type(row.only_zeros) is not bool:
        raise ValueError("not_finite or only_zeros is no such value")
    for key in ("bits_per_weight", "rel_error", "max_abs_error", "squared_error", "squared_norm"):
        value = getattr(row, key)
        if type(value) not in (int, float) or not 0 <= value <= 1e100:
            raise ValueError(f"{key} is no such number")
    if type(row.fitted) is not bool or not (row.output_error is None or _is_part(row.output_error)):
        raise ValueError("fitted or output_error is no such value")
    if not (row.sqnr_db is None or (type(row.sqnr_db) in (int, float) and abs(row.sqnr_db) <= 1e100)):
        raise ValueError("sqnr_db is no such number")
    if not all(isinstance(text, str) for text in (row.crc32, *row.sources)):
        raise ValueError("crc32 or sources are no text")
    if row.calibration_tokens is not None and (
        type(row.calibration_tokens) is not int or not 0 <= row.calibration_tokens <= MOST
    ):
        raise ValueError("calibration_tokens is no such number")
    return row


def _is_part(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1e100
