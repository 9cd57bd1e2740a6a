"""What the tensors of a result were compared with, each kind counted: what verify may claim, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ernie_quant.measure import Difference, Values

KEPT, ROUNDED, DECODED, FITTED = "kept", "rounded", "decoded", "fitted"
STORED, REPORTED, MEASURED = "stored", "reported", "measured"


@dataclass(frozen=True)
class Outcome:
    """A tensor of the result beside the source: one of the seven kinds, and what is wrong with it."""

    name: str
    kind: str
    problem: str = ""
    difference: Difference = field(default_factory=Difference)  # where it is measured
    nearest: bool = False
    values: Values | None = None  # of a kept tensor


@dataclass(frozen=True)
class Compared:
    """Tensors that agree with the source, by what was compared; the errors are those of `measured`, where no report says any."""

    kept: int = 0  # has the bytes of the source
    rounded: int = 0  # kept, in bfloat16: the nearest to what the source has
    decoded: int = 0  # kept here, quantized there: has the bytes that the source decodes to
    fitted: int = 0  # kept, and changed by calibration: the change, recomputed from the source, is that of the report
    stored: int = 0  # quantized on both sides: codes and scales are the same
    reported: int = 0  # quantized: the error, recomputed from the source, is that of the report
    measured: int = 0  # quantized, without a report: the error against the source is one that its codec makes
    nearest: int = 0  # of the measured: no code could be nearer to the source at its scales
    rel_error: float = 0.0  # of all measured weights as one vector
    worst_rel_error: float = 0.0
    worst: str = ""  # the name of that tensor

    @property
    def total(self) -> int:
        """Tensors that were compared with anything."""
        return self.kept + self.rounded + self.decoded + self.fitted + self.stored + self.reported + self.measured


def tally(outcomes: Sequence[Outcome]) -> Compared:
    """The sums over all that agree."""
    good = [outcome for outcome in outcomes if not outcome.problem]
    kinds = Counter(outcome.kind for outcome in good)
    measured = [outcome for outcome in good if outcome.kind == MEASURED]
    worst = max(measured, key=lambda o: o.difference.rel_error, default=Outcome("", MEASURED))
    return Compared(
        kept=kinds[KEPT],
        rounded=kinds[ROUNDED],
        decoded=kinds[DECODED],
        fitted=kinds[FITTED],
        stored=kinds[STORED],
        reported=kinds[REPORTED],
        measured=kinds[MEASURED],
        nearest=sum(outcome.nearest for outcome in measured),
        rel_error=sum((outcome.difference for outcome in measured), Difference()).rel_error,
        worst_rel_error=worst.difference.rel_error,
        worst=worst.name,
    )
