"""What a runtime lets a recipe decide: units of weights that have one codec, the codecs that each may have, and their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ernie_quant import runtimes
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.errors import PlanError
from ernie_quant.names import EXPERT_ROLES, ROLES
from ernie_quant.planning.choose import Choice, choose
from ernie_quant.planning.recipe import LAYER, Recipe, RecipeRule, with_method
from ernie_quant.runtimes import Runtime
from ernie_quant.weights.claims import refuse_quantized
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.plain import resolve

ATTENTION, FFN, VOCABULARY = "attention", "ffn", "vocabulary"  # where in a model a unit's error comes in


@dataclass(frozen=True)
class Option:
    """A codec for a unit; all its stored bytes."""

    codec: Codec
    nbytes: int

    @property
    def kept(self) -> bool:
        """Is it the weight as it is?"""
        return isinstance(self.codec, Keep)


@dataclass(frozen=True)
class Unit:
    """Weights of one codec. `weights`: PT names; `options`: fewest bytes first."""

    name: str
    role: str
    weights: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def layer(self) -> int:
        """Number of its layer; -1 outside of them."""
        found = LAYER.search(self.weights[0])
        return int(found[1]) if found else -1

    @property
    def place(self) -> str:
        """One of ATTENTION, FFN and VOCABULARY."""
        if self.layer < 0:
            return VOCABULARY
        return ATTENTION if ".self_attn." in self.weights[0] else FFN

    @property
    def experts(self) -> bool:
        """Is it of routed experts?"""
        return self.role in EXPERT_ROLES


@dataclass(frozen=True)
class Units:
    """All of a model: those with a choice, and the bytes of everything else."""

    runtime: str
    free: tuple[Unit, ...]
    fixed: tuple[tuple[str, Codec], ...]  # PT name -> codec, of quantized weights without a choice
    fixed_bytes: int
    weights: int  # elements of the model
    uniform: Mapping[str, tuple[int, ...]]  # form -> the option of every unit that has it, or what stands in for it there

    @property
    def target(self) -> Runtime:
        """The program."""
        return runtimes.find(self.runtime)

    @property
    def least(self) -> int:
        """Bytes of the smallest result."""
        return self.fixed_bytes + sum(unit.options[0].nbytes for unit in self.free)

    @property
    def most(self) -> int:
        """Bytes of the largest."""
        return self.fixed_bytes + sum(unit.options[-1].nbytes for unit in self.free)


def units_of(source: Checkpoint, runtime: str, method: str = "") -> Units:
    """Of a plain checkpoint; `method`: what codecs make of calibration. Raises PlanError or ConfigError."""
    target = runtimes.find(runtime)
    refuse_quantized(source)
    table = resolve(source)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    layout = LAYOUTS[target.LAYOUT]
    if problem := layout.problem(table.map.dims):
        raise PlanError(f"{source.folder}: {problem}", [])
    weights = layout.join(table.weights)
    recipes = _recipes(target, method)
    tried = [choose(weights, recipe, target).chosen for recipe in recipes]
    groups: dict[str, list[tuple[Choice, ...]]] = {}
    for choices in zip(*tried, strict=True):
        groups.setdefault(target.alike(choices[0].weight.name, choices[0].weight.role), []).append(choices)
    free, fixed, fixed_bytes = [], [], 0
    forms: list[tuple[str, ...]] = []
    for name, members in groups.items():
        options, of_tries = _options(target, members)
        names = tuple(pt for choices in members for pt in _pt_names(choices[0]))
        if len(options) > 1:
            free.append(Unit(name, members[0][0].weight.role, names, options))
            forms.append(of_tries)
            continue
        fixed_bytes += options[0].nbytes
        fixed += [] if options[0].kept else [(pt, options[0].codec) for pt in names]
    if not free:
        raise PlanError(f"{source.folder}: {target.PROGRAM} leaves nothing to choose among: every weight has one form", [])
    uniform = _uniform(recipes, free, forms)
    return Units(runtime, tuple(free), tuple(fixed), fixed_bytes, sum(c.spec.numel for c in tried[0]), uniform)


def _uniform(recipes: Sequence[Recipe], free: Sequence[Unit], forms: Sequence[tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """What each of the recipes that were tried makes of the units; not the last one, which keeps everything."""
    found = {}
    for number, recipe in enumerate(recipes):
        if not recipe.rules:
            continue
        indices = [[o.codec.form for o in unit.options].index(tries[number]) for unit, tries in zip(free, forms, strict=True)]
        found[recipe.rules[0].codec.form] = tuple(indices)
    return found


def _recipes(target: Runtime, method: str) -> list[Recipe]:
    """One that gives every linear its last candidate, one before it with the last but one, and so on; the first one is that of
    all recipes before it too. The roles that have most candidates come first in each.
    """
    offered = {role: target.candidates(role) for role in sorted(ROLES, key=lambda role: -len(target.candidates(role)))}
    most = max(map(len, offered.values()))
    found = []
    for number in range(most):
        chosen = {role: codecs[max(0, number - most + len(codecs))] for role, codecs in offered.items()}
        rules = [RecipeRule(codec, (role,), optional=True) for role, codec in chosen.items() if codec != KEEP]
        recipe = Recipe("candidates", tuple(rules), keep_unfit=True)
        found.append(with_method(recipe, method) if method else recipe)
    return found


def _options(target: Runtime, members: Sequence[tuple[Choice, ...]]) -> tuple[tuple[Option, ...], tuple[str, ...]]:
    """Codecs that every weight of a unit takes, with the bytes of all of them; and the form that each try ends in."""
    found: dict[str, Option] = {}
    forms = []
    for choices in zip(*members, strict=True):
        codecs = {choice.codec.form: choice.codec for choice in choices}
        mixed = len(codecs) > 1  # the codec does not fit a part of it: as if it were kept
        nbytes = sum(part.spec.nbytes for c in choices for part in target.parts(c.weight.name, c.codec, c.spec).values())
        codec = next(iter(codecs.values()))
        forms.append("" if mixed else codec.form)
        if not mixed:
            found.setdefault(codec.form, Option(codec, nbytes))
    options = tuple(sorted(found.values(), key=lambda option: option.nbytes))
    return options, tuple(form or options[-1].codec.form for form in forms)


def _pt_names(choice: Choice) -> tuple[str, ...]:
    weight = choice.weight
    return (weight.name,) if weight.name in weight.row.pt else weight.row.pt
