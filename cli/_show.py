"""What commands print: plans, results, inspections; for people or as one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ernie_quant.errors import shown

if TYPE_CHECKING:
    from ernie_quant.inspection import Inspection
    from ernie_quant.planning.steps import Plan
    from ernie_quant.run.whole import RunResult


def print_json(value: dict[str, Any]) -> None:
    """The one result on stdout, in ASCII: the same and valid in every locale."""
    click.echo(json.dumps(value, indent=2))


def _facts(plan: Plan) -> dict[str, Any]:
    from ernie_quant.planning.summary import bits_per_weight

    return {
        "bytes_in": plan.origin.nbytes,
        "bytes_out": plan.nbytes,
        "disk_bytes": plan.disk_bytes * (2 if plan.calibration else 1),  # calibrated weights lie there twice
        "bits_per_weight": round(bits_per_weight(plan), 4),
        "files": len(plan.shards),
        "tp_sizes": list(plan.tp_sizes),
        "gpus": {memory: asdict(spread) for memory, spread in (plan.quantized_by or plan).gpus.items()},
        "notes": list(plan.notes),
        **({"calibration": plan.calibration.shown()} if plan.calibration else {}),
    }


def show_plan(plan: Plan, as_json: bool) -> None:
    """What would happen to each group of tensors, and the bytes of the result."""
    from ernie_quant.planning.summary import summary
    from ernie_quant.reporting.tables import table

    facts, groups = _facts(plan), summary(plan)
    if as_json:
        print_json({"status": "planned", **facts, "groups": groups})
        return
    lines = [
        (g["name"], g["codec"], str(g["tensors"]), f"{g['bytes_in'] / 1e9:.3f}", f"{g['bytes_out'] / 1e9:.3f}") for g in groups
    ]
    click.echo(table(("tensors", "codec", "count", "GB in", "GB out"), lines))
    click.echo(
        f"\n{facts['bytes_in'] / 1e9:.2f} GB -> {facts['bytes_out']} bytes ({facts['bytes_out'] / 1e9:.2f} GB) of tensors,"
        f" {facts['bits_per_weight']:.3f} bits per weight, in {facts['files']} file(s); disk needed: {facts['disk_bytes']} bytes"
    )
    if plan.calibration is not None:
        said = plan.calibration
        fit = "; o_proj and the shared experts' down_proj are fitted too" if said.fit else ""
        click.echo(f"calibrated on {said.name}: {said.tokens} tokens, method {said.method}{fit}")
    _show_notes(plan)


def _show_notes(plan: Plan) -> None:
    if plan.tp_sizes:
        click.echo(f"tensor-parallel sizes that fit: {', '.join(map(str, plan.tp_sizes))}")
    if gpus := (plan.quantized_by or plan).gpus:
        fewest = ", ".join(f"{s.gpus} x {memory}{f' ({s.describe()})' if s.gpus > 1 else ''}" for memory, s in gpus.items())
        click.echo(f"fewest GPUs that hold it and a sequence of 32768 tokens: {fewest}")
    for note in plan.notes:
        click.echo(f"note: {note}")


def show_result(result: RunResult, out: Path, quiet: bool, as_json: bool) -> None:
    """What a run did and lost, and how to run what it made."""
    from ernie_quant.reporting.calibration import drift_of
    from ernie_quant.reporting.rows import output_error, total
    from ernie_quant.reporting.tables import tables
    from ernie_quant.result.card import run_commands

    plan, reports, complete = result.plan, result.reports, result.complete_before
    if as_json:
        changed = total([r for r in reports if r.changed])
        errors: dict[str, Any] = {"rel_error": changed.rel_error, "worst_rel_error": changed.worst, "quantized": changed.tensors}
        errors |= {} if (of_outputs := output_error(reports)) is None else {"output_error": of_outputs}
        errors["files_before"] = result.files_before
        print_json(
            {"status": "complete" if complete else "done", "out": str(out), **_facts(plan), **({} if complete else errors)}
        )
        return
    if complete:
        click.echo(f"{out}: complete")
        for note in result.changed:
            click.echo(f"note: {note}")
        return
    if not quiet:
        click.echo(tables(reports, drift_of(plan.calibrated)))
        _show_notes(plan)
        before = f" ({result.files_before} were finished before)" if result.files_before else ""
        click.echo(f"\n{out}: {plan.nbytes / 1e9:.3f} GB in {len(plan.shards)} file(s){before}. To run it:")
        for title, command in run_commands(plan, out):
            click.echo(f"  {title}: {command}")


def show_complete(out: Path, as_json: bool) -> None:
    """A finished folder of which nothing more is asked."""
    if as_json:
        print_json({"status": "complete", "out": str(out)})
    else:
        click.echo(f"{out}: complete")


def _roles(inspected: Inspection) -> str:
    from ernie_quant.reporting.tables import table

    lines = [(role, str(r["tensors"]), f"{r['bytes'] / 1e9:.3f}") for role, r in inspected.roles.items()]
    return table(("role", "tensors", "GB"), lines)


def _forms(inspected: Inspection) -> str:
    from ernie_quant.reporting.tables import table

    lines = [
        (f["role"], f["form"], str(f["weights"]), f"{f['bits_per_weight']:.3f}", f"{f['nbytes'] / 1e9:.3f}")
        for f in inspected.forms
    ]
    weights, nbytes = sum(f["numel"] for f in inspected.forms), sum(f["nbytes"] for f in inspected.forms)
    total = ("all", "", str(sum(f["weights"] for f in inspected.forms)), f"{8 * nbytes / weights:.3f}", f"{nbytes / 1e9:.3f}")
    return table(("role", "form", "weights", "bits per weight", "GB"), [*lines, total])


def inspection(inspected: Inspection) -> str:
    """For people."""
    from ernie_quant.inspection import COUNTS

    ranks = f", {inspected.ranks} tensor-parallel ranks" if inspected.ranks > 1 else ""
    dtypes = ", ".join(f"{n} x {dtype}" for dtype, n in sorted(inspected.dtypes.items()))
    how = f", {inspected.quantized}" if inspected.quantized else ""
    lines = [
        f"{inspected.source}: {inspected.family}, {inspected.layout} layout{how}{ranks}",
        f"{inspected.tensors} tensors ({dtypes}), {inspected.bytes / 1e9:.2f} GB in {inspected.files} file(s)",
        ", ".join(f"{COUNTS[key]} {n}" for key, n in inspected.counts.items() if n),
        ", ".join(f"{key} {n}" for key, n in inspected.dims.items()),
        "",
        _forms(inspected) if inspected.forms else _roles(inspected),
    ]
    lines += [f"note: {note}" for note in inspected.notes]
    lines += shown([f"anomaly: {anomaly}" for anomaly in inspected.anomalies])
    return "\n".join(lines if inspected.anomalies else [*lines, "", "no anomalies"])
