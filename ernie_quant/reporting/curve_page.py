"""The page of an allocation: KL divergence over bytes, what an error costs by layer, and the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ernie_quant
from ernie_quant.errors import OutputError
from ernie_quant.reporting import allocation, evaluation
from ernie_quant.reporting.numbers import in_runs, shown
from ernie_quant.reporting.page import Written, filled, put

SCRIPTS = ("base.js", "table.js", "allocation.js")
PART = 0.01  # of the residual's energy


def write(value: Mapping[str, Any], path: Path, achieved: Sequence[Mapping[str, Any]] = ()) -> Written:
    """`value`: JSON of `allocate`; `achieved`: points of results. Raises OutputError."""
    return put(path, filled("allocation.html", SCRIPTS, _data(value, achieved)))


def _data(value: Mapping[str, Any], achieved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        {"name": name, "kind": "chosen" if name == allocation.CHOSEN else "uniform", **_point(one)}
        for name, one in allocation.results(value).items()
    ]
    text = value["text"]
    return {
        "name": Path(value["recipe"]).name,
        "made": f"{value['budget']}; {value['bits_per_weight']:.3f} bits per weight; measured on {text['name']},"
                f" {text['tokens']} tokens",
        "notes": value["notes"], "codecs": [], "of_codecs": [],
        "curve": [_point(one) for one in value["curve"]],
        "rows": [*rows, *achieved],
        "gains": [
            {"layer": one["layer"], "place": one["place"], "kl": shown(one["kl"] * PART / one["error"])}
            for one in value["gains"]
            if one["error"] > 0
        ],
        "groups": [
            {"weights": group["weights"], "layers": in_runs(group["layers"]), "codec": group["codec"], **_point(group)}
            for group in value["groups"]
        ],
        "footer": f"Made by ernie-quant {ernie_quant.__version__}. KL divergence of (source || result), nats per token.",
    }  # fmt: skip


def _point(one: Mapping[str, Any]) -> dict[str, Any]:
    return {"bytes": one["bytes"], "kl": shown(one["predicted_kl"])}


def achieved_by(file: Path) -> dict[str, Any]:
    """The point of a result, of what `eval --save` has kept. Raises OutputError or CheckpointError."""
    value = evaluation.read(file)
    kl, nbytes = value["together"]["kl"], value.get("bytes")
    if kl is None or not isinstance(nbytes, int):
        raise OutputError(f"{file}: has no KL or no bytes; make it with `ernie-quant eval OUT --against SRC --save {file.name}`")
    return {"name": value["result"]["name"], "kind": "achieved", "bytes": nbytes, "kl": shown(float(kl["value"]))}
