"""A prequantized FastDeploy checkpoint of one tensor-parallel size as one of another, without loss.

Every rank's tensors are cuts and joints of the stored ones, so nothing is decoded and nothing is rounded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ernie_quant import names, ranks, stored, views
from ernie_quant.archs._config import whole
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import CheckpointError, PlanError
from ernie_quant.identity import Identity, identity
from ernie_quant.jsonio import read_object
from ernie_quant.output import README, OutputFolder
from ernie_quant.plan import SHARD_BYTES, Plan, Shard, Step, files
from ernie_quant.recipe import KEEP_ALL
from ernie_quant.report import FILENAME, TensorReport
from ernie_quant.run import Progress, RunResult, run_plan, write_all
from ernie_quant.stored import Stored

TP_KEY = "tensor_parallel_size"


def make_reshard_plan(source: Checkpoint, tp: int, *, known: Identity | None = None, shard_bytes: int = SHARD_BYTES) -> Plan:
    """The plan of `source` for `tp` ranks. Raises PlanError with every weight that cannot be shared so."""
    target = stored.runtime_of(source)
    if target.LAYOUT != names.PADDLE:
        raise PlanError(f"{source.folder}: is not FastDeploy's; only its checkpoints are stored per rank", [])
    entries, problems = stored.open_stored(source, target)
    dims, heads = stored.table_of(source, target).dims, whole(source.config, "num_attention_heads")
    if problems := [*source.anomalies, *problems] or ranks.problems(entries, tp, dims, heads):
        raise PlanError(f"{source.folder}: cannot be resharded to {tp} rank(s)", problems)
    entries = sorted(entries, key=lambda e: names.natural(e.name))
    shards: list[Shard] = []
    for folder in dict.fromkeys(target.folder(e.rule.role) for e in entries):
        inside = [e for e in entries if target.folder(e.rule.role) == folder]
        for rank in range(tp):
            place = "/".join(filter(None, [folder, f"rank{rank}" if tp > 1 else ""]))
            steps = [step for entry in inside for step in _steps(entry, rank, tp, dims)]
            shards += files(place, steps, shard_bytes)
    config = {key: value for key, value in source.config.items() if key != TP_KEY} | ({TP_KEY: tp} if tp > 1 else {})
    copies = tuple(path for path in source.extra_files if path.name != README)
    recipe, notes, reports = _reports(source)
    fits = tuple(n for n in (1, 2, 4, 8, 16) if n == tp or not ranks.problems(entries, n, dims, heads))
    rules = replace(KEEP_ALL, name=recipe or f"reshard to {tp}")
    known = known or identity(source, "fastdeploy", rules, {"reshard": tp, "max_shard_bytes": shard_bytes})
    return Plan(
        source, "fastdeploy", names.PADDLE, rules, tuple(shards), dims, config, copies, fits, (*source.notes, *notes),
        known, shard_bytes, sum(e.spec.numel for e in entries), reports,
    )  # fmt: skip


def check_size(plan: Plan, tp: int) -> None:
    """Can the result of `plan` be shared by `tp` ranks? Raises PlanError with the sizes that can."""
    sizes = [n for n in plan.tp_sizes if plan.dims["V"] % n == 0]
    if tp not in sizes:
        fits = ", ".join(map(str, sizes))
        raise PlanError(
            f"{plan.source.folder}: cannot be shared by {tp} ranks; sizes that fit its heads, widths and groups: {fits}", []
        )


def shared_identity(plan: Plan, tp: int) -> Identity:
    """The identity of the result of `plan`, shared among `tp` ranks."""
    return plan.identity if tp == 1 else {**plan.identity, "options": {**plan.identity["options"], "tp": tp}}


def run_shared(
    plan: Plan, out: Path, tp: int, *, workers: int, restart: bool, progress: Progress, disk_budget: int | None = None
) -> RunResult:
    """Quantize once and unsplit, in the private state of `out`, then share among `tp` ranks as `reshard` would.

    Raises PlanError before anything is written if the widths do not fit.
    """
    check_size(plan, tp)
    known = shared_identity(plan, tp)
    folder = OutputFolder(out)
    with folder.begin(replace(plan, identity=known), restart=restart, copies=2) as complete:
        if complete:
            return RunResult(plan, complete_before=True, reports=())
        run_plan(plan, folder.unsplit, workers=workers, disk_budget=disk_budget, progress=progress)
        ranked = make_reshard_plan(Checkpoint.open(folder.unsplit), tp, known=known, shard_bytes=plan.shard_bytes)
        return write_all(replace(ranked, quantized_by=plan), folder, workers)


def _steps(entry: Stored, rank: int, tp: int, dims: ranks.Dims) -> list[Step]:
    """One step for every stored tensor of a weight, in the order in which the runtime stores them."""
    steps = []
    for part in entry.target.parts(entry.name, entry.codec, entry.spec):
        view = ranks.share(entry, part, rank, tp, dims)
        spec = views.spec_of(view)
        sources = tuple(dict.fromkeys(ref.name for ref in views.refs(view)))
        steps.append(Step(part, entry.rule.role, view, spec, KEEP, {part: spec}, sources, multiple=2, group=entry.name))
    return steps


def _reports(source: Checkpoint) -> tuple[str, tuple[str, ...], tuple[TensorReport, ...]]:
    """Recipe, notes and what was measured when the checkpoint was made; nothing for one that others published."""
    try:
        table = read_object(source.folder / FILENAME)
        rows = tuple(TensorReport.from_json(row) for row in table["tensors"])
        return str(table["recipe"]), tuple(n for n in table["notes"] if n not in source.notes), rows
    except (CheckpointError, KeyError, TypeError):
        return "", (), ()
