"""Which codec for which tensor: by role or by name, first match wins, the rest is kept.

# recipe.toml
[[rule]]
match = 'layers\\.(3|4)\\.mlp\\.experts'     # regex, searched in the PT name
codec = "rtn"
bits = 8

[[rule]]
role = "experts"
codec = "rtn"
bits = 4
group_size = 128

[calibration]
text = "auto"                                 # planning/calibration.py

`runtime = "llama_cpp"`, before all of these, names the program that they are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ernie_quant import codecs, plugins, runtimes
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import PlanError
from ernie_quant.names import QUANTIZABLE, ROLES, VOCABULARY, NameMap, Weight
from ernie_quant.planning import calibration
from ernie_quant.planning.calibration import Asked
from ernie_quant.settings import Settings, read_toml

LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class RecipeRule:
    """A codec for every quantizable linear of some roles (of any, if none is given) with one of `names`, or whose PT name
    the regex `match` finds.

    `if_unused` is what a user is told when no tensor fits, `if_taken` when rules before it take all that do, with the number
    of their {layers} and the {last} of them; an `optional` rule need not fit any.
    """

    codec: Codec
    roles: tuple[str, ...] = ()
    match: str = ""
    if_unused: str = ""
    if_taken: str = ""
    optional: bool = False
    names: frozenset[str] = frozenset()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.match)

    def takes(self, weight: Weight) -> bool:
        """Does the rule apply to this linear? (A fused one, in Paddle layout, where it applies to one of its PT names.)

        To embeddings and head a rule applies where it names their role.
        """
        if self.roles and weight.role not in self.roles:
            return False
        if not (weight.row.rule.linear or (weight.role in VOCABULARY and self.roles and weight.name.endswith(".weight"))):
            return False
        pt = (weight.name,) if weight.name in weight.row.pt else weight.row.pt
        if self.names:
            return not self.names.isdisjoint(pt)
        return not self.match or any(self._pattern.search(name) for name in pt)

    def describe(self) -> str:
        """For people."""
        roles = f"role {' or '.join(self.roles)}" if self.roles else ""
        some = sorted(self.names)
        which = f"{some[0]}{f' and {len(some) - 1} more' if some[1:] else ''}" if some else ""
        return " and ".join(filter(None, [roles, f"match = {self.match!r}" if self.match else "", which]))


@dataclass(frozen=True)
class Recipe:
    """Rules in order; `keep_unfit` leaves tensors that a codec cannot take as they are."""

    name: str
    rules: tuple[RecipeRule, ...] = ()
    keep_unfit: bool = False
    calibration: Asked | None = None  # what a file of rules says of it
    rules_of: Callable[[NameMap], Sequence[RecipeRule]] | None = None  # of a model, instead of `rules`
    runtime: str = ""  # that a file of rules names
    words: str = ""  # of the command that has it built in: `wint4 --experts-only`
    as_stored: bool = False  # does what a quantized source has keep its codes?

    def codec_for(self, weight: Weight) -> Codec:
        """The codec for a tensor; only linears of quantizable roles, embeddings and head are ever changed."""
        rule = self._rule_for(weight)
        return rule.codec if rule else KEEP

    def _rule_for(self, weight: Weight) -> RecipeRule | None:
        return next((rule for rule in self.rules if rule.takes(weight)), None)

    def for_model(self, model: NameMap) -> Recipe:
        """With the rules that depend on the model."""
        return self if self.rules_of is None else replace(self, rules=tuple(self.rules_of(model)), rules_of=None)

    def unused(self, weights: Sequence[Weight]) -> list[str]:
        """Rules that apply to nothing in this checkpoint."""
        linears = [w for w in weights if w.row.rule.linear or w.role in VOCABULARY]
        unused = [r for r in self.rules if not r.optional and not any(r.takes(w) for w in linears)]
        problems = [r.if_unused or f"recipe {self.name}: no linear of this model fits {r.describe()}" for r in unused]
        for rule in (r for r in self.rules if r.if_taken and r not in unused):
            fitting = [w for w in linears if rule.takes(w)]
            if not any(self._rule_for(w) is rule for w in fitting):
                layers = sorted({int(found[1]) for w in fitting if (found := LAYER.search(w.name))})
                problems.append(rule.if_taken.format(layers=len(layers), last=layers[-1]))
        return problems


KEEP_ALL = Recipe("keep")
CONVERT = Recipe("keep", as_stored=True)


def with_method(rules: Recipe, method: str) -> Recipe:
    """The recipe whose codecs look at inputs with this method, where they can and their rules do not name another."""
    later = None if rules.rules_of is None else partial(_rules_with, method, rules.rules_of)
    return replace(rules, rules=tuple(_ruled(rule, method) for rule in rules.rules), rules_of=later)


def _rules_with(method: str, rules_of: Callable[[NameMap], Sequence[RecipeRule]], model: NameMap) -> list[RecipeRule]:
    return [_ruled(rule, method) for rule in rules_of(model)]


def _ruled(rule: RecipeRule, method: str) -> RecipeRule:
    return replace(rule, codec=_with_method(rule.codec, method))


def _with_method(codec: Codec, method: str) -> Codec:
    return codec if not takes_method(codec) or own_method(codec) else replace(codec, method=method)  # type: ignore[type-var]


def takes_method(codec: Codec) -> bool:
    """Can it look at inputs?"""
    return any(f.name == "method" for f in fields(codec))  # type: ignore[arg-type]


def own_method(codec: Codec) -> str:
    """The method that its rule names, if it names one."""
    usual = next((f.default for f in fields(codec) if f.name == "method"), None)  # type: ignore[arg-type]
    mine = getattr(codec, "method", usual)
    return "" if mine == usual else str(mine)


def read(path: Path, *, keep_unfit: bool = False) -> Recipe:
    """The recipe in a TOML file. Raises PlanError with every mistake in it."""
    table = read_toml(path)
    entries = table.pop("rule", [])
    problems: list[str] = []
    asked, runtime = None, table.pop("runtime", "")
    if runtime and runtime not in (known := plugins.names(runtimes)):
        problems.append(f"runtime is {runtime!r:.80}, not {', '.join(known)}")
    if "calibration" in table:
        asked = calibration.read(Settings("[calibration]", table.pop("calibration"), problems), path.parent)
    problems += [f"{key}: unknown; a recipe has [[rule]] tables, [calibration] and runtime" for key in table]
    found = of_rules(path.stem, entries, keep_unfit=keep_unfit, where=str(path), problems=problems)
    return replace(found, calibration=asked, runtime=runtime)


def of_rules(
    name: str, entries: object, *, keep_unfit: bool = False, where: str = "rule", problems: Sequence[str] = ()
) -> Recipe:
    """The recipe of [[rule]] tables. Raises PlanError with every mistake in them, after `problems`."""
    problems = list(problems)
    if not isinstance(entries, list) or not entries:
        raise PlanError(f"{where}: has no [[rule]]", problems)
    rules = []
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_rule(dict(entry)))
        except (PlanError, ValueError, TypeError) as error:
            problems.append(f"rule {number}: {error}")
    if problems:
        raise PlanError(f"{where}: {len(problems)} mistake(s)", problems)
    return Recipe(name, tuple(rules), keep_unfit)


def _rule(entry: dict[str, Any]) -> RecipeRule:
    role, match, names, codec = (entry.pop(key, "") for key in ("role", "match", "names", "codec"))
    if sum(map(bool, (role, match, names))) != 1:
        raise ValueError("needs one of role, match and names")
    can_be = [r for r in ROLES if r in QUANTIZABLE or r in VOCABULARY]
    if role and role not in can_be:
        raise ValueError(f"role {role!r} is not one that can be quantized ({', '.join(can_be)})")
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("names is not a list of PT names")
    if match:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"match {match!r} is no regular expression: {error}") from None
    if not codec:
        raise ValueError("needs a codec")
    return RecipeRule(codecs.make(codec, entry), (role,) if role else (), match, names=frozenset(names))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """For the manifest."""
    rules = [{"applies_to": r.describe(), "codec": r.codec.describe()} for r in recipe.rules]
    return {"name": recipe.name, "rules": rules, "keep_unfit": recipe.keep_unfit}
