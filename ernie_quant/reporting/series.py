"""Tensors that differ only in the numbers in their names (and in their errors) are one series: 54 layers of 128 experts take
half a megabyte."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from ernie_quant.errors import line_of
from ernie_quant.reporting import expected
from ernie_quant.reporting.numbers import short, shown
from ernie_quant.reporting.place import Place
from ernie_quant.reporting.rows import TensorReport

OF_OUTPUTS = 3  # significant digits of errors of outputs

Alike = TypeVar("Alike", bound=Hashable)
Item = TypeVar("Item")


def series(rows: Sequence[TensorReport], roles: Mapping[str, int], codecs: Mapping[str, int]) -> list[dict[str, Any]]:
    """What tensors share once, and a column of each of the ids in their names and of their errors."""
    keyed = ((row.name, (row.role, row.codec, row.shape, row.bytes, row.bits_per_weight, row.fitted), row) for row in rows)
    found = []
    for places, (role, codec, shape, nbytes, bits, fitted), group in alike(keyed):
        entry = named(places) | {
            "role": roles[role],
            "codec": codecs[codec],
            "shape": shape,
            "bytes": nbytes,
            "bits": shown(bits),
        }
        if fitted:
            entry["fitted"] = True
        elif group[0].changed and (usual := expected.of(codec, shape)) is not None:
            entry["expected"] = short(usual)
        found.append(entry | _errors(group))
    return found


def alike(items: Iterable[tuple[str, Alike, Item]]) -> Iterable[tuple[list[Place], Alike, list[Item]]]:
    """Groups of items (name, what they share, itself) whose names differ in numbers alone, in the order of these."""
    groups: dict[tuple[tuple[str, ...], Alike], list[tuple[Place, Item]]] = {}
    for name, shared, item in items:
        place = Place.of(line_of(name))
        groups.setdefault((place.parts, shared), []).append((place, item))
    for (_, shared), group in groups.items():
        group.sort(key=lambda pair: pair[0].ids)
        yield [place for place, _ in group], shared, [item for _, item in group]


def named(places: Sequence[Place]) -> dict[str, Any]:
    """How the names of a series are put together, and what they say."""
    first = places[0]
    entry: dict[str, Any] = {
        "parts": first.parts,
        "ids": [_in_runs([place.ids[i] for place in places]) for i in range(len(first.ids))],
        "n": len(places),
    }
    if first.layer is not None:
        entry |= {"layer": first.layer, "block": first.block, "projection": first.projection}
    return entry if first.expert is None else entry | {"expert": first.expert}


def _in_runs(ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """The column, or where that is shorter each value and how often it stands there in a row."""
    runs = [x for value, same in groupby(ids) for x in (value, sum(1 for _ in same))]
    return {"runs": runs} if len(runs) < len(ids) else list(ids)


def _errors(group: Sequence[TensorReport]) -> dict[str, Any]:
    """Columns of errors, where there are any."""
    entry: dict[str, Any] = {}
    if any(row.rel_error or row.max_abs_error for row in group):
        entry |= {"error": [shown(row.rel_error) for row in group], "largest": [shown(row.max_abs_error) for row in group]}
    if any(row.output_error is not None for row in group):
        entry |= {
            "output": [shown(row.output_error, OF_OUTPUTS) for row in group],
            "tokens": _once([row.calibration_tokens for row in group]),
        }
    return entry


def _once(values: list[int | None]) -> list[int | None] | int | None:
    """The value that all have, if they have one."""
    return values[0] if len(set(values)) == 1 else values
