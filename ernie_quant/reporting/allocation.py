"""What an allocation has chosen, for people."""

from __future__ import annotations

from ernie_quant.planning.allocate import Allocation
from ernie_quant.planning.allocated import in_runs
from ernie_quant.reporting.tables import table
from ernie_quant.run.allocate import Allocated


def as_text(made: Allocated, command: str) -> str:
    """Tables, and what to type next."""
    lines = [
        (group.name, in_runs(group.layers) if group.layers[0] >= 0 else "", group.codec.form,
         f"{group.nbytes / 1e9:.3f}", f"{group.kl:.2g}")
        for group in made.groups
        if group.nbytes
    ]  # fmt: skip
    found = [table(("weights", "layers", "codec", "GB", "predicted KL"), lines), ""]
    rows = [("allocated", *_row(made.chosen))]
    rows += [(f"{form} everywhere", *_row(one)) for form, one in made.uniform.items()]
    if made.unordered is not None:
        rows.append(("allocated, if any layer could have any", *_row(made.unordered)))
    found.append(table(("", "GB of tensors", "predicted KL, nats per token"), rows))
    found += [f"note: {note}" for note in made.notes]
    found.append(f"\n{made.recipe}: {made.budget}; {made.bits_per_weight:.3f} bits per weight. To make it:\n  {command}")
    return "\n".join(found)


def _row(one: Allocation) -> tuple[str, str]:
    return f"{one.nbytes / 1e9:.3f}", f"{one.kl:.4g}"
