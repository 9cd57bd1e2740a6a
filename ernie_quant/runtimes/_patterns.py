"""Regular expressions for sets of layer names, derived from the names and checked against them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

NUMBER = re.compile(r"\d+")


def cover(chosen: Collection[str], others: Collection[str]) -> list[str]:
    """Patterns (for re.match, without prefix) that match every chosen name and none of the others.

    Names that differ in numbers only become one pattern: `\\d+` where every number is meant, else a list of them.
    """
    universe = _by_template([*chosen, *others])
    patterns = []
    for template, numbers in _by_template(chosen).items():
        columns = list(zip(*numbers, strict=True))
        every = list(zip(*universe[template], strict=True))
        sets = [sorted(set(c), key=int) for c in columns]
        if len(set(numbers)) != _product(sets):  # not a full grid: name them one by one
            patterns += [re.escape(_fill(template, n)) for n in numbers]
            continue
        choices = [r"\d+" if set(s) == set(e) else _one_of(s) for s, e in zip(sets, every, strict=True)]
        patterns.append(_fill(re.escape(template), choices))
    return _join_projections(patterns)


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _by_template(names: Collection[str]) -> dict[str, list[tuple[str, ...]]]:
    table: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for name in names:
        table[NUMBER.sub("\0", name)].append(tuple(NUMBER.findall(name)))
    return table


def _fill(template: str, numbers: Collection[str]) -> str:
    pieces = re.split("\\\\?\0", template)
    return "".join(a + b for a, b in zip(pieces, [*numbers, ""], strict=True))


def _product(sets: list[list[str]]) -> int:
    total = 1
    for s in sets:
        total *= len(s)
    return total


def _join_projections(patterns: list[str]) -> list[str]:
    """`x\\.gate_proj`, `x\\.up_proj` -> `x\\.(?:gate|up)_proj`."""
    heads: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        head, dot, last = pattern.rpartition(r"\.")
        heads[head + dot if last.endswith("_proj") else pattern].append(last.removesuffix("_proj"))
    return [f"{head}{_one_of(last)}_proj" if head.endswith(r"\.") else head for head, last in heads.items()]
