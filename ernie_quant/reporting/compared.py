"""The data of a page that shows two results of a model side by side: A and B."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie_quant.errors import OutputError, line_of
from ernie_quant.reporting.columns import layers_first, numbered_codecs, of_codecs, sums
from ernie_quant.reporting.facts import as_object, facts
from ernie_quant.reporting.numbers import shown
from ernie_quant.reporting.rows import TensorReport, grouped, layer_of, total
from ernie_quant.reporting.saved import Report
from ernie_quant.reporting.series import alike, named, series

Key = tuple[str, tuple[int, ...], int]  # name, shape, and which of the rows that share both


def compared(a: Report, b: Report) -> dict[str, Any]:
    """All that the page shows. Raises OutputError for results without a tensor of the same name and shape."""
    of_a, of_b = _keyed(a.rows), _keyed(b.rows)
    pairs = [(row, of_b[key]) for key, row in of_a.items() if key in of_b]
    if not pairs:
        raise OutputError(
            f"{a.name} and {b.name} have no tensor of the same name and shape: are they of one model, and in the same layout?"
        )
    both = [*a.rows, *b.rows]
    codecs, roles = numbered_codecs(both), {name: i for i, name in enumerate(grouped(both, lambda r: r.role))}
    alone = [row for key, row in of_a.items() if key not in of_b], [row for key, row in of_b.items() if key not in of_a]
    return {
        "facts": [facts(a), facts(b)],
        "warnings": _warnings(a, b),
        "both": _of_both([(one, two) for one, two in pairs if one.changed and two.changed]),
        "codecs": [line_of(name) for name in codecs],
        "of_codecs": of_codecs(both, codecs),
        "roles": [line_of(name) for name in roles],
        "by_role": _side_by_side(a, b, codecs, lambda row: row.role),
        "by_layer": sorted(
            _side_by_side(a, b, codecs, lambda row: layer_of(row.name)), key=lambda line: layers_first(line["name"])
        ),
        "series": _series(pairs, roles, codecs),
        "only": [series(rows, roles, codecs) for rows in alone],
    }


def _keyed(rows: Sequence[TensorReport]) -> dict[Key, TensorReport]:
    seen: dict[tuple[str, tuple[int, ...]], int] = {}
    found: dict[Key, TensorReport] = {}
    for row in rows:
        count = seen[row.name, row.shape] = seen.get((row.name, row.shape), -1) + 1
        found[row.name, row.shape, count] = row
    return found


def _of_both(pairs: Sequence[tuple[TensorReport, TensorReport]]) -> dict[str, Any]:
    """Errors over the tensors that both have quantized: only these compare like with like."""
    errors = [shown(total([pair[side] for pair in pairs]).rel_error) if pairs else None for side in (0, 1)]
    return {"tensors": len(pairs), "error": errors}


def _warnings(a: Report, b: Report) -> list[str]:
    """What makes it doubtful that both are of one model."""
    sources = [as_object(report.manifest.get("source")) for report in (a, b)]
    said = [report.manifest.get("source_name") for report in (a, b)]
    found = []
    if sources[0].get("config") != sources[1].get("config"):
        found.append("The two were made from sources with other config.json: they may not be of one model.")
    if said[0] != said[1] and all(isinstance(name, str) for name in said):
        found.append(f"A was made from {line_of(str(said[0]))}, B from {line_of(str(said[1]))}.")
    return found


def _side_by_side(
    a: Report, b: Report, codecs: Mapping[str, int], key: Callable[[TensorReport], str]
) -> list[dict[str, Any]]:  # fmt: skip
    """Sums of the groups that either has; None where one has none."""
    groups = grouped(a.rows, key), grouped(b.rows, key)
    names = dict.fromkeys([*groups[0], *groups[1]])
    return [
        {"name": line_of(name), "of": [sums(found[name], codecs) if name in found else None for found in groups]}
        for name in names
    ]


def _series(
    pairs: Sequence[tuple[TensorReport, TensorReport]], roles: Mapping[str, int], codecs: Mapping[str, int]
) -> list[dict[str, Any]]:  # fmt: skip
    """As of one result, with two codecs, sizes and errors; the errors of one whose tensors all keep their bits are left out."""
    keyed = ((a.name, (a.role, a.shape, (a.codec, b.codec), (a.bytes, b.bytes), a.fitted or b.fitted), (a, b)) for a, b in pairs)
    found = []
    for places, (role, shape, both, nbytes, fitted), group in alike(keyed):
        entry = named(places) | {
            "role": roles[role],
            "shape": shape,
            "codec": codecs[both[0]],
            "codec_b": codecs[both[1]],
            "bytes": nbytes[0],
            "bytes_b": nbytes[1],
        }
        errors = {"error": [a.rel_error for a, _ in group], "error_b": [b.rel_error for _, b in group]}
        entry |= {name: [shown(x) for x in values] for name, values in errors.items() if any(values)}
        found.append(entry | ({"fitted": True} if fitted else {}))
    return found
