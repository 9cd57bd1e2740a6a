"""The JSON result of an allocation, as `allocate --json` gives it, for people: tables, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_quant.reporting.numbers import in_runs
from ernie_quant.reporting.tables import table

CHOSEN, FREE = "allocated", "allocated, if any layer could have any"


def text(value: Mapping[str, Any], command: str) -> str:
    """`command` makes the result."""
    lines = [
        (
            group["weights"],
            in_runs(group["layers"]),
            group["codec"],
            f"{group['bytes'] / 1e9:.3f}",
            f"{group['predicted_kl']:.2g}",
        )
        for group in value["groups"]
        if group["bytes"]
    ]
    found = [table(("weights", "layers", "codec", "GB", "predicted KL"), lines), ""]
    rows = [(name, f"{one['bytes'] / 1e9:.3f}", f"{one['predicted_kl']:.4g}") for name, one in results(value).items()]
    found.append(table(("", "GB of tensors", "predicted KL, nats per token"), rows))
    found += [f"note: {note}" for note in value["notes"]]
    bits = f"{value['bits_per_weight']:.3f} bits per weight"
    found.append(f"\n{value['recipe']}: {value['budget']}; {bits}. To make it:\n  {command}")
    return "\n".join(found)


def results(value: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was chosen, one codec everywhere, and what the order of layers that a program wants costs."""
    found = {CHOSEN: value, **{f"{form} everywhere": one for form, one in value["uniform"].items()}}
    free = value["without_order_of_layers"]
    return found if free is None else {**found, FREE: free}
