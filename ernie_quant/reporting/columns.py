"""The data of the page: the rows of a report as columns, sums by role and by layer, and facts about the result."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.codecs.keep import KEPT
from ernie_quant.errors import line_of
from ernie_quant.reporting import usual
from ernie_quant.reporting.calibration import drift_of, tokens_of_experts
from ernie_quant.reporting.facts import as_object, as_text, facts
from ernie_quant.reporting.numbers import shown
from ernie_quant.reporting.rows import TensorReport, grouped, layer_of, output_error, total
from ernie_quant.reporting.saved import Report
from ernie_quant.reporting.series import series


def columns(report: Report) -> dict[str, Any]:
    """All that the page shows, as small as plain JSON can say it."""
    by_role, layers = grouped(report.rows, lambda r: r.role), grouped(report.rows, lambda r: layer_of(r.name))
    codecs, roles = numbered_codecs(report.rows), {name: i for i, name in enumerate(by_role)}
    found: dict[str, Any] = {
        "facts": facts(report),
        "codecs": [line_of(name) for name in codecs],
        "of_codecs": of_codecs(report.rows, codecs),
        "roles": [line_of(name) for name in roles],
        "by_role": [sums(group, codecs) for group in by_role.values()],
        "by_layer": [{"name": line_of(name), **sums(layers[name], codecs)} for name in sorted(layers, key=layers_first)],
        "series": series(report.rows, roles, codecs),
    }
    if output_error(report.rows) is not None:
        said = as_object(report.header.get("calibration"))
        found["calibration"] = _calibration(said)
        of_layers = {f"layer {layer}": value for layer, value in drift_of(said).items()}
        for line in found["by_layer"]:
            line |= {"drift": shown(of_layers[line["name"]])} if line["name"] in of_layers else {}
    return found


def numbered_codecs(rows: Sequence[TensorReport]) -> dict[str, int]:
    """Codec -> its number on the page: kept first, then by bits."""
    by_codec = grouped(rows, lambda r: r.codec)
    names = sorted(by_codec, key=lambda name: (name != KEPT, total(by_codec[name]).bits_per_weight, name))
    return {name: i for i, name in enumerate(names)}


def of_codecs(rows: Sequence[TensorReport], codecs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Of each codec whether it changes weights, what is usual of the errors of its tensors, and of those of outputs."""
    changed, errors = [row for row in rows if row.changed], usual.by_codec(rows)
    lossy = {row.codec for row in changed}
    outputs = grouped([row for row in changed if row.output_error is not None], lambda row: row.codec)
    found = []
    for codec in codecs:
        entry: dict[str, Any] = {"changed": codec in lossy}
        if (of_errors := errors.get(codec)) is not None:
            entry["error"] = _bounds(of_errors)
        if (of_outputs := usual.of([row.output_error or 0.0 for row in outputs.get(codec, ())])) is not None:
            entry["output"] = _bounds(of_outputs)
        found.append(entry)
    return found


def _bounds(of: usual.Usual) -> dict[str, Any]:
    return {"median": of.median, "least": of.least, "largest": of.largest, "low": of.low, "high": of.high}


def _calibration(said: Mapping[str, Any]) -> dict[str, Any]:
    """What was run through the model, and what is known of layers and experts."""
    return {
        "name": as_text(said.get("name")),
        "tokens": _whole(said.get("tokens")),
        "judging": _whole(said.get("judging_tokens")),
        "method": as_text(said.get("method")),
        "fit": said.get("fit") is True,
        "drift": [[layer, shown(value)] for layer, value in drift_of(said).items()],
        "experts": {str(layer): counts for layer, counts in tokens_of_experts(said).items()},
    }


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def layers_first(name: str) -> tuple[bool, int]:
    """The layers by number; all else keeps its order."""
    numbered = re.fullmatch(r"layer ([0-9]{1,6})", name)
    return (not numbered, int(numbered[1]) if numbered else 0)


def sums(group: Sequence[TensorReport], codecs: Mapping[str, int]) -> dict[str, Any]:
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
        "bits": shown(everything.bits_per_weight),
        "error": shown(lossy.rel_error) if changed else None,
        "worst": shown(lossy.worst) if changed else None,
        "codecs": [codecs[codec] for codec in sorted(weights, key=lambda c: (-weights[c], c))],
        **({} if of_outputs is None else {"output": shown(of_outputs)}),
    }
