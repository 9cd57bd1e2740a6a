"""The data of the page: the rows of a report as columns, sums by role and by layer, and facts about the result.

Tensors that differ only in the numbers in their names (and in their errors) are one series, so that 54 layers of 128
experts take half a megabyte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.codecs.keep import KEPT
from ernie_quant.errors import line_of
from ernie_quant.report.calibration import drift_of, tokens_of_experts
from ernie_quant.report.place import Place
from ernie_quant.report.rows import TensorReport, grouped, layer_of, output_error, total
from ernie_quant.report.saved import Report

DIGITS, OF_OUTPUTS = 4, 3  # significant ones, of errors of weights and of outputs


def columns(report: Report) -> dict[str, Any]:
    """All that the page shows, as small as plain JSON can say it."""
    by_codec, by_role = grouped(report.rows, lambda r: r.codec), grouped(report.rows, lambda r: r.role)
    names = sorted(by_codec, key=lambda name: (name != KEPT, total(by_codec[name]).bits_per_weight, name))
    codecs, roles = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(by_role)}
    layers = grouped(report.rows, lambda r: layer_of(r.name))
    found: dict[str, Any] = {
        "facts": _facts(report),
        "codecs": [line_of(name) for name in codecs],
        "roles": [line_of(name) for name in roles],
        "by_role": [_sums(group, codecs) for group in by_role.values()],
        "by_layer": [{"name": line_of(name), **_sums(layers[name], codecs)} for name in sorted(layers, key=_layers_first)],
        "series": _series(report.rows, roles, codecs),
    }
    if output_error(report.rows) is not None:
        said = _object(report.header.get("calibration"))
        found["calibration"] = _calibration(said)
        of_layers = {f"layer {layer}": value for layer, value in drift_of(said).items()}
        for line in found["by_layer"]:
            line |= {"drift": _short(of_layers[line["name"]])} if line["name"] in of_layers else {}
    return found


def _calibration(said: Mapping[str, Any]) -> dict[str, Any]:
    """What was run through the model, and what is known of layers and experts."""
    return {
        "name": _text(said.get("name")),
        "tokens": _whole(said.get("tokens")),
        "judging": _whole(said.get("judging_tokens")),
        "method": _text(said.get("method")),
        "fit": said.get("fit") is True,
        "drift": [[layer, _short(value)] for layer, value in drift_of(said).items()],
        "experts": {str(layer): counts for layer, counts in tokens_of_experts(said).items()},
    }


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _layers_first(name: str) -> tuple[bool, int]:
    """The layers by number; all else keeps its order."""
    numbered = re.fullmatch(r"layer ([0-9]{1,6})", name)
    return (not numbered, int(numbered[1]) if numbered else 0)


def _facts(report: Report) -> dict[str, Any]:
    everything, changed = total(report.rows), total([row for row in report.rows if row.changed])
    source, recipe = _object(report.manifest.get("source")), _object(report.manifest.get("recipe"))
    files = [_object(file) for file in _object(source.get("files")).values()]
    weight_files = [file["bytes"] for file in files if "header" in file and type(file.get("bytes")) is int]
    rules = map(_object, _list(recipe.get("rules")))
    return {
        "name": line_of(report.name),
        "source": _text(report.manifest.get("source_name")),
        "revision": _text(source.get("revision")),
        "version": _text(report.manifest.get("version")),
        "recipe": _text(report.header.get("recipe")),
        "rules": [[_text(rule.get("applies_to")), _text(rule.get("codec"))] for rule in rules],
        "runtime": _text(report.header.get("runtime")),
        "notes": [_text(note) for note in _list(report.header.get("notes"))],
        "source_bytes": max(0, sum(weight_files)),
        "bytes": everything.bytes,
        "weights": everything.weights,
        "tensors": everything.tensors,
        "changed": changed.tensors,
        "bits": _short(everything.bits_per_weight),
        "error": _short(changed.rel_error) if changed.tensors else None,
    }


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return line_of(value) if isinstance(value, str) else ""


def _sums(group: Sequence[TensorReport], codecs: Mapping[str, int]) -> dict[str, Any]:
    """One line of a table; the errors are those of the tensors that changed."""
    changed = [row for row in group if row.changed]
    everything, lossy = total(group), total(changed)
    weights: dict[str, int] = {}
    for row in changed:
        weights[row.codec] = weights.get(row.codec, 0) + math.prod(row.shape)
    of_outputs = output_error(group)
    return {
        "tensors": everything.tensors,
        "changed": lossy.tensors,
        "weights": everything.weights,
        "bytes": everything.bytes,
        "bits": _short(everything.bits_per_weight),
        "error": _short(lossy.rel_error) if changed else None,
        "worst": _short(lossy.worst) if changed else None,
        "codecs": [codecs[codec] for codec in sorted(weights, key=lambda c: (-weights[c], c))],
        **({} if of_outputs is None else {"output": _short(of_outputs)}),
    }


def _series(rows: Sequence[TensorReport], roles: Mapping[str, int], codecs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tensors alike: what they share once, and a column of each of the ids in their names and of their errors."""
    alike: dict[tuple[Any, ...], list[tuple[Place, TensorReport]]] = {}
    for row in rows:
        place = Place.of(line_of(row.name))
        key = (place.parts, row.role, row.codec, row.shape, row.bytes, row.bits_per_weight)
        alike.setdefault(key, []).append((place, row))
    series = []
    for (parts, role, codec, shape, nbytes, bits), group in alike.items():
        group.sort(key=lambda pair: pair[0].ids)
        first = group[0][0]
        entry = {
            "parts": parts,
            "ids": [[place.ids[i] for place, _ in group] for i in range(len(first.ids))],
            "role": roles[role],
            "codec": codecs[codec],
            "shape": shape,
            "bytes": nbytes,
            "bits": _short(bits),
            "n": len(group),
        }
        if first.layer is not None:
            entry |= {"layer": first.layer, "block": first.block, "projection": first.projection}
        if first.expert is not None:
            entry["expert"] = first.expert
        if any(row.rel_error or row.max_abs_error for _, row in group):
            entry |= {
                "error": [_short(row.rel_error) for _, row in group],
                "largest": [_short(row.max_abs_error) for _, row in group],
            }
        if any(row.output_error is not None for _, row in group):
            entry |= {
                "output": [None if row.output_error is None else _short(row.output_error, OF_OUTPUTS) for _, row in group],
                "tokens": _once([row.calibration_tokens for _, row in group]),
            }
        series.append(entry)
    return series


def _once(values: list[int | None]) -> list[int | None] | int | None:
    """The value that all have, if they have one."""
    return values[0] if len(set(values)) == 1 else values


def _short(value: float, digits: int = DIGITS) -> float | int | None:
    """The number with so many significant digits, or None for one that JSON has no word for."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) and short < 1e15 else short
