"""What quantizing each unit costs, as a file that another allocation of the same model can begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_quant.disk import write_file
from ernie_quant.errors import PlanError
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.planning.units import Units

FORMAT = "ernie-quant sensitivity 1"


@dataclass(frozen=True)
class Disturbed:
    """A stream of hidden states: where it was disturbed, how much, and its KL in nats per token in the end.

    `error`: energy of the error over that of the residual, mean over tokens; `place`: of planning.units.
    """

    layer: int
    place: str
    error: float
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """`errors` (as in `Disturbed`; None where no text goes) and `costs` (nats per token) of every option of every unit.

    `source`: names the model without saying where it lies. `text`: what it read. `method`: what codecs made of it, or "".
    """

    source: Mapping[str, str]
    runtime: str
    text: Mapping[str, Any]
    method: str
    forms: Mapping[str, Sequence[str]]  # unit -> its options
    errors: Mapping[str, Sequence[float | None]]
    costs: Mapping[str, Sequence[float]]
    gains: Sequence[Disturbed]
    stand_ins: int = 0  # units that no text goes through, whose costs are those of others

    def costs_of(self, units: Units) -> list[Sequence[float]]:
        """In the order of units."""
        return [self.costs[unit.name] for unit in units.free]

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        write_file(path, dumps({"format": FORMAT, **asdict(self)}).encode())


def load(path: Path, source: Mapping[str, str], units: Units, method: str) -> Sensitivity:
    """That of this model and these units. Raises PlanError or CheckpointError."""
    value = read_object(path)
    if value.pop("format", None) != FORMAT:
        raise PlanError(f"{path}: is no file of `ernie-quant allocate --sensitivity`; choose another name", [])
    try:
        gains = tuple(Disturbed(**gain) for gain in value.pop("gains"))
        found = Sensitivity(**value, gains=gains)
        known = {name: list(forms) for name, forms in found.forms.items()}
        lengths = all(len(found.costs[name]) == len(forms) for name, forms in known.items())
        sound = lengths and all(type(cost) is float for costs in found.costs.values() for cost in costs)
        weights = found.source["weights"], found.source["config"]
    except (TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"{path}: is broken ({error!r:.100}); remove it to measure again", []) from None
    wanted = {unit.name: [option.codec.form for option in unit.options] for unit in units.free}
    if not sound:
        raise PlanError(f"{path}: is broken (its costs are no numbers of its forms); remove it to measure again", [])
    for what, has, wants in (
        ("runtime", found.runtime, units.runtime), ("method", found.method or "none", method or "none"),
        ("model", weights, (source["weights"], source["config"])), ("units and codecs", known, wanted),
    ):  # fmt: skip
        if has != wants:
            said = f" {has}, not {wants}" if isinstance(has, str) else "s of another kind or version"
            raise PlanError(f"{path}: has the {what}{said}; choose another name, or remove it to measure again", [])
    return found
