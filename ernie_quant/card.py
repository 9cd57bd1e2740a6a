"""README.md of a result: what it is, how to run it, what it lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ernie_quant
from ernie_quant import report, runtimes
from ernie_quant.plan import Plan, bits_per_weight
from ernie_quant.report import TensorReport


def run_commands(plan: Plan, out: Path) -> list[tuple[str, str]]:
    """(runtime, command) that run the result in `out`."""
    found: list[tuple[str, str]] = runtimes.find(plan.runtime).commands(out, plan.config, plan.tp_sizes)
    return found


def readme(plan: Plan, rows: Sequence[TensorReport], name: str) -> str:
    """Markdown. The commands name the folder as it is called now."""
    quantized = any(r.codec != "kept" for r in rows)
    verb = f"quantized ({plan.recipe.name})" if quantized else f"converted to {plan.layout}"
    source = plan.origin.title
    sizes = f"{plan.origin.nbytes / 1e9:.2f} GB became {plan.nbytes / 1e9:.2f} GB, {bits_per_weight(plan):.2f} bits per weight."
    parts = [f"# {name}\n\n{source}, {verb} by ernie-quant {ernie_quant.__version__}. {sizes}"]
    for runtime, command in run_commands(plan, Path(name)):
        parts.append(f"## {runtime}\n\n```\n{command}\n```")
    if plan.tp_sizes:
        parts.append(f"Tensor-parallel sizes that its widths, heads and groups allow: {', '.join(map(str, plan.tp_sizes))}.")
    if quantized:
        parts.append(
            f"## Error\n\nrel. error = ||W - W'||^2 / ||W||^2; every tensor is in report.json.\n\n```\n{report.tables(rows)}\n```"
        )
    if plan.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in plan.notes))
    return "\n\n".join(parts) + "\n"
