"""From a budget to a recipe: units, what each of them costs, the choice, and the plan that shows that it fits."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.disk import write_file
from ernie_quant.errors import OutputError, PlanError
from ernie_quant.planning import allocated, measured
from ernie_quant.planning.allocate import Allocation, solve, uniform
from ernie_quant.planning.allocated import Group, groups_of
from ernie_quant.planning.budget import Budget
from ernie_quant.planning.calibration import Asked
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.measured import Sensitivity
from ernie_quant.planning.recipe import KEEP_ALL, of_rules, takes_method
from ernie_quant.planning.steps import Plan
from ernie_quant.planning.summary import bits_per_weight
from ernie_quant.planning.units import Units, units_of
from ernie_quant.threads import Progress
from ernie_quant.version import __version__
from ernie_quant.weights.plain import resolve

LENGTH = 256  # tokens of a window: many short ones are of more kinds of text
TRIES = 8
POINTS = 16  # of a curve


@dataclass(frozen=True)
class Wish:
    """What somebody wants. `text`: `auto` or files that the model reads; `tokens` of it are judged by."""

    runtime: str
    budget: Budget
    text: tuple[Path, ...] | str
    tokens: int
    asked: Asked | None  # calibration of the result


@dataclass(frozen=True)
class Allocated:
    """What came of it; KL in nats per token, as predicted: the sum of what units cost alone.

    `uniform`: form -> what giving it to all would be. `unordered`: what the program's order of layers costs, if it has one.
    `curve`: (bytes, KL) of the best for other budgets.
    """

    recipe: str
    runtime: str
    budget: str
    chosen: Allocation
    bits_per_weight: float
    groups: tuple[Group, ...]
    uniform: Mapping[str, Allocation]
    unordered: Allocation | None
    curve: tuple[tuple[int, float], ...]
    sensitivity: Sensitivity
    notes: tuple[str, ...]


def allocate(
    source: Checkpoint, wish: Wish, out: Path, keep: Path | None = None, progress: Progress = lambda _: None
) -> Allocated:  # fmt: skip
    """From beginning to end; `keep`: a file for what is measured. Raises as its three steps do."""
    units = begin(source, wish, out)
    return choose(source, units, sensitivity(source, units, wish, keep, progress), wish, out)


def begin(source: Checkpoint, wish: Wish, out: Path) -> Units:
    """What there is to choose among, before anything long is done. Raises PlanError, ConfigError, TextError or OutputError."""
    if out.suffix != ".toml":
        raise OutputError(f"{out}: a recipe is a file that ends with .toml")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}")
    units = units_of(source, wish.runtime, wish.asked.method if wish.asked else "")
    if wish.asked and not any(takes_method(option.codec) for unit in units.free for option in unit.options):
        raise PlanError(
            f"{units.target.PROGRAM}'s types look at no text: leave out --calibration; --text says what is measured on", []
        )
    if wish.budget.gpus is None and wish.budget.first(units) < units.least:
        raise PlanError(_too_few(units, wish.budget), [])
    return units


def _too_few(units: Units, budget: Budget) -> str:
    bits = 8 * units.least / units.weights
    return (
        f"{budget.describe()} is too little: with the fewest bits everywhere that {units.target.PROGRAM} takes, this model has"
        f" {units.least} bytes of tensors ({units.least / 1e9:.2f} GB, {bits:.2f} bits per weight)"
    )


def work(source: Checkpoint) -> int:
    """Bytes that the progress of measuring adds up to."""
    from ernie_quant.calibration.opened import of_checkpoint

    found: int = of_checkpoint(source).nbytes
    return found


def sensitivity(source: Checkpoint, units: Units, wish: Wish, keep: Path | None, progress: Progress) -> Sensitivity:
    """Measured, or of the file `keep`, which is written if it is not there. Raises what reading a model does, and PlanError."""
    from ernie_quant.calibration import sensitivity as room
    from ernie_quant.calibration.opened import of_checkpoint
    from ernie_quant.calibration.tokenizer import BESIDE, VOCABULARIES, tokenizer_of
    from ernie_quant.calibration.windows import windows

    method, readable = wish.asked.method if wish.asked else "", of_checkpoint(source)
    if keep is not None and not keep.parent.is_dir():
        raise OutputError(f"{keep}: there is no folder {keep.parent}")
    if keep is not None and keep.exists():
        return measured.load(keep, readable.identity, units, method)
    wanted = (wish.asked.tokens if wish.asked else 0) or wish.tokens
    source.bring(path for path in source.extra_files if path.name in (*VOCABULARIES, *BESIDE))
    text = windows(tokenizer_of(source.folder), wish.text, wanted, length=LENGTH, judge=bool(method))
    found: Sensitivity = room.measure(readable, units, text, method=method, progress=progress)
    if keep is not None:
        found.save(keep)
    return found


def choose(
    source: Checkpoint, units: Units, found: Sensitivity, wish: Wish, out: Path, *, curve: bool = True
) -> Allocated:  # fmt: skip
    """The best that fits, written to `out`; `curve`: that of other sizes too. Raises PlanError where nothing does."""
    costs = found.costs_of(units)
    fitting = _fitting(source, units, found, wish, out)
    write_file(out, fitting.text.encode())
    budget = min(fitting.budget, units.most)
    unordered = solve(units, costs, budget, ordered=False) if units.target.MORE_BITS_FIRST else None
    return Allocated(
        str(out), wish.runtime, wish.budget.describe(), fitting.chosen, bits_per_weight(fitting.plan), fitting.groups,
        uniform(units, costs), unordered, _curve(units, costs) if curve else (), found, tuple(_notes(found)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Fitting:
    """A choice that fits: the bytes of tensors that were allowed for it, its recipe and its plan."""

    budget: int
    chosen: Allocation
    groups: tuple[Group, ...]
    text: str
    plan: Plan


def _fitting(source: Checkpoint, units: Units, found: Sensitivity, wish: Wish, out: Path) -> _Fitting:
    """What headers, a vocabulary or a KV cache take is known with a plan only: it is made again with less until it fits."""
    costs, config = found.costs_of(units), resolve(source).config
    budget, tries = wish.budget.first(units), 0
    while budget >= units.least:
        chosen = solve(units, costs, min(budget, units.most))
        groups = tuple(groups_of(units, chosen, costs))
        text = allocated.text(_head(units, found, wish, chosen), wish.runtime, groups, wish.asked, out.parent)
        plan = _plan(source, wish.runtime, out.stem, text)
        excess = wish.budget.excess(plan, config)
        if excess <= 0 and not groups:
            raise PlanError(f"{wish.budget.describe()}: has room for the model as it is; nothing need be quantized", [])
        if excess <= 0:
            return _Fitting(budget, chosen, groups, text, plan)
        if math.isinf(excess):
            raise PlanError(f"{wish.budget.describe()}: its heads and widths cannot be shared by so many GPUs", [])
        tries += 1
        budget = min(budget, chosen.nbytes) - max(math.ceil(excess), tries - TRIES)
    raise PlanError(_too_few(units, wish.budget), [])


def _plan(source: Checkpoint, runtime: str, name: str, text: str) -> Plan:
    """Of the recipe as it is written."""
    rules = tomllib.loads(text).get("rule")
    return make_plan(source, runtime=runtime, recipe=of_rules(name, rules) if rules else KEEP_ALL)


def _curve(units: Units, costs: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    """Best allocations for sizes from the smallest to the largest result, evenly in the logarithm."""
    ratio = (units.most / units.least) ** (1 / (POINTS - 1))
    sizes = [min(units.most, math.ceil(units.least * ratio**i)) for i in range(POINTS)]
    found: list[tuple[int, float]] = []
    for size in sizes:
        one = solve(units, costs, size)
        if not found or one.kl < found[-1][1]:  # within its tolerance the solver may miss what a smaller size has
            found.append((one.nbytes, one.kl))
    return tuple(found)


def _head(units: Units, found: Sensitivity, wish: Wish, chosen: Allocation) -> list[str]:
    """Comments of the recipe."""
    costs = found.costs_of(units)
    lines = [
        f"Allocated by ernie-quant {__version__} for {units.target.PROGRAM}: {wish.budget.describe()}.",
        f"Tensors: {chosen.nbytes} bytes. Predicted KL divergence from the source: {chosen.kl:.4g} nats per token,",
        f"the sum of what each part costs alone on {found.text['name']} ({found.text['tokens']} tokens).",
        "What is not named here is kept.",
        "One codec everywhere would be:",
    ]  # fmt: skip
    lines += [f"    {form}: {one.nbytes} bytes, {one.kl:.4g} nats" for form, one in uniform(units, costs).items()]
    return lines


def _notes(found: Sensitivity) -> list[str]:
    if not found.stand_ins:
        return []
    return [
        f"experts for images are taken to cost what those for text do, for no text goes through them: {found.stand_ins} units"
    ]


def as_json(made: Allocated) -> dict[str, Any]:
    """For --json."""
    return {
        "status": "allocated", "recipe": made.recipe, "runtime": made.runtime, "budget": made.budget,
        "bytes": made.chosen.nbytes, "bits_per_weight": round(made.bits_per_weight, 4), "predicted_kl": made.chosen.kl,
        "uniform": {form: {"bytes": one.nbytes, "predicted_kl": one.kl} for form, one in made.uniform.items()},
        "without_order_of_layers": made.unordered and {"bytes": made.unordered.nbytes, "predicted_kl": made.unordered.kl},
        "groups": [_group(group) for group in made.groups],
        "curve": [{"bytes": nbytes, "predicted_kl": kl} for nbytes, kl in made.curve],
        "gains": [asdict(gain) for gain in made.sensitivity.gains],
        "text": dict(made.sensitivity.text), "notes": list(made.notes),
    }  # fmt: skip


def _group(group: Group) -> dict[str, Any]:
    layers = [layer for layer in group.layers if layer >= 0]
    return {"codec": group.codec.form, "weights": group.name, "layers": layers, "bytes": group.nbytes, "predicted_kl": group.kl}
