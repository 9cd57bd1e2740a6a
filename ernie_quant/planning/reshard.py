"""A prequantized FastDeploy checkpoint of one tensor-parallel size as one of another, without loss.

Every rank's tensors are cuts and joints of the stored ones, so nothing is decoded and nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ernie_quant import names, plugins, runtimes
from ernie_quant.archs._config import whole
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import CheckpointError, PlanError
from ernie_quant.jsonio import finite_only, read_object
from ernie_quant.paths import README
from ernie_quant.planning.carried import carried
from ernie_quant.planning.code import modules_of, without_missing
from ernie_quant.planning.files import files
from ernie_quant.planning.identity import Identity, identity
from ernie_quant.planning.recipe import KEEP_ALL
from ernie_quant.planning.steps import SHARD_BYTES, Plan, Shard, Step
from ernie_quant.reporting.rows import FILENAME, TensorReport
from ernie_quant.runtimes import About, Runtime, _sharing, kept
from ernie_quant.views import build
from ernie_quant.views.kinds import spec_of
from ernie_quant.weights import ranks
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.stored import Stored, linears_of, open_stored, runtime_of, table_of

TP_KEY = "tensor_parallel_size"


def make_reshard_plan(
    source: Checkpoint, tp: int, *, known: Identity | None = None, shard_bytes: int = SHARD_BYTES,
    copy: Sequence[str] = (), copy_code: bool = False,
) -> Plan:  # fmt: skip
    """The plan of `source` for `tp` ranks. Raises PlanError with every weight that cannot be shared so."""
    target = runtime_of(source)
    if not target.PER_RANK:
        raise PlanError(f"{source.folder}: is not FastDeploy's; only its checkpoints are stored per rank", [])
    entries, problems = open_stored(source, target)
    table, heads = table_of(source, target), whole(source.config, "num_attention_heads")
    dims = table.dims
    if problems := [*source.anomalies, *problems] or _share_problems(entries, target, tp, dims, heads):
        raise PlanError(f"{source.folder}: cannot be resharded to {tp} rank(s)", problems)
    entries = sorted(entries, key=lambda e: names.natural(e.name))
    about = About(source, source.config, table, "", [(entry.codec, entry.spec.numel) for entry in entries])
    shards: list[Shard] = []
    for folder in dict.fromkeys(target.folder(e.rule.role) for e in entries):
        inside = [e for e in entries if target.folder(e.rule.role) == folder]
        for rank in range(tp):
            place = "/".join(filter(None, [folder, f"rank{rank}" if tp > 1 else ""]))
            steps = [step for entry in inside for step in _steps(entry, rank, tp, dims)]
            shards += files(place, steps, target, shard_bytes, target.stem(about))
    config = {key: value for key, value in finite_only(source.config).items() if key != TP_KEY} | ({TP_KEY: tp} if tp > 1 else {})
    along = carried(source, copy, copy_code)
    copies = tuple(path for path in along.files if source.name_of(path) != README)
    config = without_missing(config, modules_of(copies))
    recipe, notes, reports, calibrated = _reports(source)
    runtime = plugins.name_of(target, runtimes)
    fits = _sharing.tp_sizes(target, linears_of(entries), dims, heads)
    rules = replace(KEEP_ALL, name=recipe or f"reshard to {tp}")
    unmeasured = {} if reports else {"report": False}  # files that others published
    asked = {**({"copy": sorted({*copy})} if copy else {}), **({"copy_code": True} if copy_code else {})}
    options = {"reshard": tp, "max_shard_bytes": shard_bytes, **asked, **unmeasured}
    known = known or identity(source, runtime, rules, options)
    today = (*source.notes, *along.notes)
    return Plan(
        source, runtime, LAYOUTS[target.LAYOUT], rules, tuple(shards), dims, config, copies, fits,
        (*today, *(note for note in notes if note not in today)),
        known, shard_bytes, weights=sum(e.spec.numel for e in entries), reports=reports,
        calibrated=calibrated if isinstance(calibrated, dict) else None, metadata=target.metadata(about)[0],
    )  # fmt: skip


def _share_problems(entries: Sequence[Stored], target: Runtime, of: int, dims: ranks.Dims, heads: int) -> list[str]:
    """Why weights cannot be shared by `of` ranks."""
    if refused := list(_sharing.problems(target, linears_of(entries), dims, heads, of)):
        return refused
    for entry in entries:
        for part, view in entry.parts.items():
            assert ranks.divides(view, entry.shares(part), of, dims), f"{part} cannot be cut for {of} ranks"
    return []


def check_size(plan: Plan, tp: int) -> None:
    """Can the result of `plan` be shared by `tp` ranks? Raises PlanError with the sizes that can."""
    if tp > 1 and not (runtimes.find(plan.runtime).PER_RANK and "quantization_config" in plan.config):
        raise PlanError(
            f"{plan.source.folder}: only quantized checkpoints for FastDeploy are stored per rank; leave out --tp", []
        )
    if tp not in plan.tp_sizes:
        fits = ", ".join(map(str, plan.tp_sizes))
        raise PlanError(
            f"{plan.source.folder}: cannot be shared by {tp} ranks; sizes that fit its heads, widths and groups: {fits}", []
        )


def shared_identity(plan: Plan, tp: int) -> Identity:
    """The identity of the result of `plan`, shared among `tp` ranks."""
    return plan.identity if tp == 1 else {**plan.identity, "options": {**plan.identity["options"], "tp": tp}}


def _steps(entry: Stored, rank: int, tp: int, dims: ranks.Dims) -> list[Step]:
    """One step for every stored tensor of a weight, in the order in which the runtime stores them."""
    steps = []
    for part in entry.expected:
        view = ranks.share(entry.parts[part], entry.shares(part), rank, tp, dims)
        spec = spec_of(view)
        sources = tuple(dict.fromkeys(ref.name for ref in build.refs(view)))
        steps.append(Step(part, entry.rule.role, view, spec, KEEP, {part: kept(spec)}, sources, multiple=2, group=entry.name))
    return steps


def _reports(source: Checkpoint) -> tuple[str, tuple[str, ...], tuple[TensorReport, ...], Any]:
    """Recipe, notes, what was measured when the checkpoint was made, and what it was calibrated on; nothing for one that
    others published."""
    try:
        table = read_object(source.folder / FILENAME)
        rows = tuple(TensorReport.from_json(row) for row in table["tensors"])
        return str(table["recipe"]), tuple(table["notes"]), rows, table.get("calibration")
    except (CheckpointError, KeyError, TypeError):
        return "", (), (), None
