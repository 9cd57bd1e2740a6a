"""The page of an allocation: KL divergence over bytes, what an error costs by layer, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ernie_quant
from ernie_quant.errors import OutputError
from ernie_quant.planning.allocated import in_runs
from ernie_quant.reporting import evaluation
from ernie_quant.reporting.numbers import shown
from ernie_quant.reporting.page import Written, filled, put
from ernie_quant.run.allocate import Allocated

SCRIPTS = ("base.js", "table.js", "allocation.js")
PART = 0.01  # of the residual's energy


def write(made: Allocated, path: Path, achieved: Sequence[Path] = ()) -> Written:
    """`achieved`: what `eval --save` has kept of results. Raises OutputError or CheckpointError."""
    return put(path, filled("allocation.html", SCRIPTS, _data(made, achieved)))


def _data(made: Allocated, achieved: Sequence[Path]) -> dict[str, Any]:
    rows = [{"name": "allocated", "kind": "chosen", "bytes": made.chosen.nbytes, "kl": shown(made.chosen.kl)}]
    rows += [
        {"name": f"{form} everywhere", "kind": "uniform", "bytes": one.nbytes, "kl": shown(one.kl)}
        for form, one in made.uniform.items()
    ]
    rows += [_achieved(file) for file in achieved]
    text = made.sensitivity.text
    return {
        "name": Path(made.recipe).name,
        "made": f"{made.budget}; {made.bits_per_weight:.3f} bits per weight; measured on {text['name']}, {text['tokens']} tokens",
        "notes": list(made.notes), "codecs": [], "of_codecs": [],
        "curve": [{"bytes": nbytes, "kl": shown(kl)} for nbytes, kl in made.curve],
        "rows": rows,
        "gains": [
            {"layer": one.layer, "place": one.place, "kl": shown(one.kl * PART / one.error)}
            for one in made.sensitivity.gains
            if one.error > 0
        ],
        "groups": [
            {"weights": group.name, "layers": in_runs(group.layers) if group.layers[0] >= 0 else "",
             "codec": group.codec.form, "bytes": group.nbytes, "kl": shown(group.kl)}
            for group in made.groups
        ],
        "footer": f"Made by ernie-quant {ernie_quant.__version__}. KL divergence of (source || result), nats per token.",
    }  # fmt: skip


def _achieved(file: Path) -> dict[str, Any]:
    value = evaluation.read(file)
    kl, nbytes = value["together"]["kl"], value.get("bytes")
    if kl is None or not isinstance(nbytes, int):
        raise OutputError(
            f"{file}: has no KL, or no bytes; evaluate with `ernie-quant eval OUT --against SRC --save {file.name}`"
        )
    return {"name": value["result"]["name"], "kind": "achieved", "bytes": nbytes, "kl": shown(float(kl["value"]))}
