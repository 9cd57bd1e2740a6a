"""Values that no sound model has: a faithful result has those of its source, and somebody must say that they are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ernie_quant.check.compared import DECODED, KEPT, ROUNDED, Outcome
from ernie_quant.measure import Values, means_something
from ernie_quant.names import natural
from ernie_quant.reporting.rows import TensorReport

BY_SOURCE, BY_REPORT, BY_NOBODY = "source", "report", ""  # who says it too


@dataclass(frozen=True)
class Odd:
    """Weights that no sound model has, and who else says so of each."""

    not_finite: Mapping[str, str] = field(default_factory=dict)
    only_zeros: Mapping[str, str] = field(default_factory=dict)


def odd(
    found: Mapping[str, Values], outcomes: list[Outcome], reports: Mapping[str, TensorReport]
) -> tuple[Odd, list[str]]:  # fmt: skip
    """What the files hold (`found`, of the weights that were looked at) and the report says (of the others); what differs."""
    same = {o.name for o in outcomes if not o.problem and o.kind in (KEPT, ROUNDED, DECODED)}
    found = {**found, **{o.name: o.values for o in outcomes if o.values is not None}}
    problems = [line for name, values in found.items() if name not in same for line in _problems(name, values, reports)]
    said = {name: Values(row.not_finite, row.only_zeros) for name, row in reports.items()}
    every = {**said, **found}
    infinite = {name for name, values in every.items() if values.not_finite}
    zeros = {name for name, values in every.items() if values.only_zeros and means_something(name)}
    reported = {name for name, values in said.items() if values.not_finite or values.only_zeros}

    def who(names: set[str]) -> dict[str, str]:
        ordered = sorted(names, key=natural)
        return {name: BY_SOURCE if name in same else BY_REPORT if name in reported else BY_NOBODY for name in ordered}

    return Odd(who(infinite), who(zeros)), problems


def _problems(name: str, values: Values, reports: Mapping[str, TensorReport]) -> Iterator[str]:
    """Of a weight whose source nobody has looked at."""
    row = reports.get(name)
    if row is None:
        if values.not_finite:
            yield (
                f"{name}: {values.not_finite} of its values are NaN or infinity, and no report says so;"
                " compare it with its source"
            )
        return
    if values.not_finite != row.not_finite:
        yield f"{name}: {values.not_finite} of its values are NaN or infinity, the report says {row.not_finite}"
    zeros = values.only_zeros and means_something(name)
    if row.only_zeros and not zeros:
        yield f"{name}: the report says that it holds nothing but zeros, and it holds others"
    if zeros and not (row.only_zeros or row.changed or row.as_stored):
        yield f"{name}: holds nothing but zeros, and the report does not say so"
