"""What completes a folder: small files of the source, index, config, report, card, hashes, and the manifest last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ernie_quant.disk import write_file
from ernie_quant.errors import line_of
from ernie_quant.jsonio import dumps
from ernie_quant.paths import CONFIG, MANIFEST, README, SUMS
from ernie_quant.planning.steps import Plan
from ernie_quant.reporting import calibration
from ernie_quant.reporting import rows as report
from ernie_quant.reporting.rows import ShardResult, TensorReport
from ernie_quant.result import card
from ernie_quant.result.carry import carry
from ernie_quant.result.folder import OutputFolder
from ernie_quant.result.manifest import describe, manifest, sums
from ernie_quant.result.room import models
from ernie_quant.runtimes import Place


def finish(folder: OutputFolder, plan: Plan, shards: Sequence[ShardResult], rows: Sequence[TensorReport]) -> Plan:
    """Write all but the weights, whose files are `shards`; the plan with what there is to note.

    Raises OSError, or CheckpointError for a source that changed.
    """
    out = folder.path
    entries: dict[str, dict[str, object]] = {s.filename: {"bytes": s.nbytes, "sha256": s.sha256} for s in shards}

    def put(name: str, data: bytes) -> None:
        entries[name] = {"bytes": len(data), "sha256": write_file(out / name, data)}

    carried, missing = carry(plan, out)
    entries |= carried
    folder.forget_copies(entries)
    plan = replace(plan, notes=(*plan.notes, *missing))
    for place, inside in plan.folders.items():
        if len(inside) > 1 and plan.format.INDEX:
            index = plan.format.index({shard.filename.rpartition("/")[2]: shard.specs for shard in inside})
            put(f"{place}/{plan.format.INDEX}".lstrip("/"), dumps(index).encode())
    for model in models(plan):
        put(f"{model}/{CONFIG}".lstrip("/"), dumps(plan.config).encode())
    odd = report.odd_values(rows or [row for shard in shards for row in shard.reports])
    plan = replace(plan, notes=tuple(dict.fromkeys([*plan.notes, *odd, *calibration.notes(plan.calibrated)])))
    if rows:
        header: dict[str, object] = {"recipe": plan.recipe.name, "runtime": plan.runtime, "notes": list(plan.notes)}
        header |= {"calibration": plan.calibrated} if plan.calibrated else {}
        put(report.FILENAME, report.to_json(rows, header).encode())
    described = describe(plan)
    put(README, card.readme(described, plan.config, rows, Place(line_of(out.name))).encode())
    text = dumps(manifest(described, plan, entries)).encode()
    write_file(out / SUMS, sums(entries, text).encode())
    write_file(out / MANIFEST, text)
    folder.drop_state()
    return plan
