"""Regular expressions for sets of layer names, derived from the names and checked against them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import TypeAlias, TypeVar

NUMBER = re.compile(r"(\d+)")
Numbers: TypeAlias = tuple[str, ...]
K = TypeVar("K", bound=Hashable)


def covers(groups: Mapping[K, Collection[str]]) -> dict[K, list[str]]:
    """For each group, patterns (for re.match, without prefix) that match every name of it and none of any other.

    Names that differ in numbers only become one pattern: `\\d+` where every number is meant, else a list of them.
    """
    tables = {key: _by_template(names) for key, names in groups.items()}
    universe: dict[str, set[Numbers]] = defaultdict(set)
    for table in tables.values():
        for template, numbers in table.items():
            universe[template] |= numbers
    return {key: _patterns(table, universe) for key, table in tables.items()}


def _patterns(chosen: Mapping[str, set[Numbers]], universe: Mapping[str, set[Numbers]]) -> list[str]:
    patterns = []
    for template, numbers in chosen.items():
        sets = [set(column) for column in zip(*numbers, strict=True)]
        every = [set(column) for column in zip(*universe[template], strict=True)]
        if len(numbers) != math.prod(map(len, sets)):  # not a full grid: name them one by one
            patterns += [re.escape(_fill(template, n)) for n in sorted(numbers, key=lambda n: [int(x) for x in n])]
            continue
        choices = [r"\d+" if s == e else _one_of(sorted(s, key=int)) for s, e in zip(sets, every, strict=True)]
        patterns.append(_fill(re.escape(template), choices))
    return _join_projections(patterns)


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"


def _by_template(names: Collection[str]) -> dict[str, set[Numbers]]:
    table: dict[str, set[Numbers]] = defaultdict(set)
    for name in names:
        words = NUMBER.split(name)  # text, number, text, …
        table["\0".join(words[0::2])].add(tuple(words[1::2]))
    return table


def _fill(template: str, numbers: Collection[str]) -> str:
    pieces = re.split("\\\\?\0", template)
    return "".join(a + b for a, b in zip(pieces, [*numbers, ""], strict=True))


def _join_projections(patterns: list[str]) -> list[str]:
    """`x\\.gate_proj`, `x\\.up_proj` -> `x\\.(?:gate|up)_proj`."""
    heads: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        head, dot, last = pattern.rpartition(r"\.")
        heads[head + dot if last.endswith("_proj") else pattern].append(last.removesuffix("_proj"))
    return [f"{head}{_one_of(last)}_proj" if head.endswith(r"\.") else head for head, last in heads.items()]
