"""Which codec for which unit under a budget of bytes: an exact choice, by what each costs at the model's output.

minimize sum c[u, o] x[u, o], of which exactly one x[u, .] is 1 and the others 0, with sum b[u, o] x[u, o] at most the budget;
c: KL divergence in nats per token, as measured for one unit at a time (calibration/sensitivity.py), b: stored bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ernie_quant.errors import PlanError
from ernie_quant.planning.units import Units

if TYPE_CHECKING:
    import numpy as np

Costs = Sequence[Sequence[float]]  # of every option of every unit, in nats per token
SECONDS = 60  # that the solver may take
GAP = 1e-4  # of the optimum that is good enough


@dataclass(frozen=True)
class Allocation:
    """An option of every unit; what is expected of it."""

    chosen: tuple[int, ...]
    nbytes: int
    kl: float  # nats per token: the sum of what units cost alone


def allocation(units: Units, costs: Costs, chosen: Sequence[int]) -> Allocation:
    """With its bytes and its cost."""
    nbytes = units.fixed_bytes + sum(unit.options[i].nbytes for unit, i in zip(units.free, chosen, strict=True))
    return Allocation(tuple(chosen), nbytes, sum(cost[i] for cost, i in zip(costs, chosen, strict=True)))


def solve(units: Units, costs: Costs, budget: int, *, ordered: bool | None = None) -> Allocation:
    """The cheapest of at most `budget` bytes. Raises PlanError where nothing is so small.

    `ordered`: as the runtime wants it, if not said otherwise: experts have no more bits than those of the layer before.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    if budget < units.least:
        raise PlanError(
            f"{budget} bytes are too few: with the fewest bits that {units.target.PROGRAM} takes everywhere this model has"
            f" {units.least} bytes ({units.least / 1e9:.2f} GB)", []
        )  # fmt: skip
    sizes = [len(unit.options) for unit in units.free]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    cost = np.concatenate([np.asarray(c, float) for c in costs])
    nbytes = np.array([option.nbytes for unit in units.free for option in unit.options], float)
    room = float(budget - units.fixed_bytes)
    rows = [LinearConstraint(_one_each(sizes), 1, 1), LinearConstraint(nbytes[None] / 1e6, -np.inf, room / 1e6)]
    if units.target.MORE_BITS_FIRST if ordered is None else ordered:
        rows += [LinearConstraint(row, -np.inf, 0) for row in _in_order(units, starts)]
    scale = max(float(cost.max()), 1e-30)
    with _silent():
        found = milp(
            cost / scale, integrality=np.ones(len(cost)), bounds=Bounds(0, 1), constraints=rows,
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )  # fmt: skip
    assert found.x is not None, found.message  # the smallest options everywhere are one solution
    chosen = [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]
    return allocation(units, costs, chosen)


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS now and then prints a line of its own on the process's stdout, whatever `disp` says; that is the place of results."""
    sys.stdout.flush()
    try:
        before = os.dup(1)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what it has printed may wait in the C library
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)


def _one_each(sizes: Sequence[int]) -> Any:
    """One row per unit, with ones at its options."""
    import numpy as np
    from scipy.sparse import csr_matrix

    rows = np.repeat(np.arange(len(sizes)), sizes)
    return csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def _in_order(units: Units, starts: np.ndarray) -> list[np.ndarray]:
    """Rows for neighbouring layers of experts: number of the option of the later one, less that of the one before, is <= 0."""
    import numpy as np

    experts = sorted((unit.layer, number) for number, unit in enumerate(units.free) if unit.experts)
    rows = []
    for (_, before), (_, later) in pairwise(experts):
        row = np.zeros(int(starts[-1]))
        for sign, number in ((-1, before), (1, later)):
            row[starts[number] : starts[number + 1]] = sign * np.arange(len(units.free[number].options))
        rows.append(row)
    return rows


def uniform(units: Units, costs: Costs) -> dict[str, Allocation]:
    """Form -> the result that has it wherever it fits."""
    return {form: allocation(units, costs, chosen) for form, chosen in units.uniform.items()}
