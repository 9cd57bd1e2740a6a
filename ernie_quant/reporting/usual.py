"""What is usual among the tensors of a codec, and which of them are outliers.

Errors of a codec lie within a few percent of each other where weights are alike, so they are compared as logarithms with their
median: an outlier is off by more than 3.5 spreads (1.4826 times the median distance from the median, which a few outliers do
not move), and by a quarter at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ernie_quant.reporting.numbers import short
from ernie_quant.reporting.rows import TensorReport, grouped

LEAST_TENSORS = 8  # of fewer nothing can be said
SPREADS, LEAST_FACTOR = 3.5, 1.25  # 3.5: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993
NORMAL = 1.4826  # of a normal distribution: its standard deviation over its median distance from the median
HIGH, LOW = "high", "low"


@dataclass(frozen=True)
class Usual:
    """Errors of the tensors of a codec; outside of `low` and `high` are outliers. The bounds are None where there are few."""

    tensors: int
    median: float
    least: float
    largest: float
    low: float | None
    high: float | None

    def mark(self, error: float) -> str:
        """`high`, `low`, or nothing; of an error as the page shows it."""
        if self.low is None or self.high is None or not error:
            return ""
        return HIGH if short(error) > self.high else LOW if short(error) < self.low else ""


def of(errors: Sequence[float]) -> Usual | None:
    """What is usual among errors; those of weights that lost nothing do not count. None where all are so."""
    found = sorted(error for error in errors if error > 0)
    if not found:
        return None
    middle = median(found)
    low = high = None
    if len(found) >= LEAST_TENSORS:
        logs = [math.log(error) for error in found]
        spread = NORMAL * median(abs(x - math.log(middle)) for x in logs)
        factor = max(LEAST_FACTOR, math.exp(min(SPREADS * spread, 300)))
        low, high = short(middle / factor), short(min(middle * factor, 1e300))
    return Usual(len(found), short(middle), short(found[0]), short(found[-1]), low, high)


def by_codec(rows: Sequence[TensorReport]) -> dict[str, Usual]:
    """Codec -> what is usual for its tensors; of those that changed.

    What makes up for errors before it is meant to differ from the source and does not count; where most of a codec is so, nothing
    can be an outlier.
    """
    found = {}
    for codec, group in grouped([row for row in rows if row.changed], lambda row: row.codec).items():
        plain = [row for row in group if not row.fitted]
        most = 2 * len(plain) >= len(group)
        if (usual := of([row.rel_error for row in (plain if most else group)])) is not None:
            found[codec] = usual if most else replace(usual, low=None, high=None)
    return found


def mark(row: TensorReport, of_codecs: Mapping[str, Usual]) -> str:
    """`high`, `low`, or nothing."""
    usual = of_codecs.get(row.codec) if row.changed and not row.fitted else None
    return "" if usual is None else usual.mark(row.rel_error)
