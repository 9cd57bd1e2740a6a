"""What a checkpoint is: layout, dimensions, where its bytes are, and everything that is wrong with it. Headers only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant import names, report
from ernie_quant.checkpoint import Checkpoint, TensorSpec
from ernie_quant.errors import shown
from ernie_quant.resolve import Table, resolve

LAYOUT_NAMES = {names.PADDLE: "Paddle", names.PT: "PT", names.PADDLEFORMERS: "paddleformers (third layout)"}


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` shows."""

    source: str
    family: str
    layout: str
    ranks: int
    files: int
    tensors: int
    bytes: int
    dtypes: dict[str, int]  # tensors per dtype
    dims: dict[str, int]
    counts: dict[str, int]  # layers, MoE layers, experts per modality, …
    roles: dict[str, dict[str, int]]  # role -> tensors, bytes
    anomalies: tuple[str, ...]
    notes: tuple[str, ...]


def inspect(source: Path, fixes: frozenset[str] = frozenset()) -> Inspection:
    """Look at a checkpoint. Raises CheckpointError or ConfigError where nothing more can be said."""
    checkpoint = Checkpoint.open(source)
    table = resolve(checkpoint, fixes)
    refs = [ref for rank in checkpoint.ranks for ref in rank.refs.values()]
    dtypes: dict[str, int] = {}
    for ref in refs:
        dtypes[ref.spec.dtype] = dtypes.get(ref.spec.dtype, 0) + 1
    counts = {key: len(table.map.ids[key]) for key in COUNTS if key in table.map.ids}
    return Inspection(
        str(source), table.arch.__name__.rpartition(".")[2], LAYOUT_NAMES[names.layout_of(list(checkpoint.refs))],
        len(checkpoint.ranks), sum(len(r.files) for r in checkpoint.ranks), len(refs), checkpoint.nbytes,
        dtypes, dict(table.map.dims), counts, _roles(table), tuple(table.problems), checkpoint.notes,
    )  # fmt: skip


# ids of an architecture, and what a person calls their number
COUNTS = {
    "layer": "layers", "dense": "dense layers", "moe": "MoE layers", "expert": "experts (text)",
    "vision_expert": "experts (vision)", "shared": "layers with shared experts", "mtp": "MTP blocks", "block": "vision blocks",
}  # fmt: skip


def _roles(table: Table) -> dict[str, dict[str, int]]:
    """Tensors (as PT counts them) and bytes by role."""
    roles: dict[str, dict[str, int]] = {}
    for weight in table.weights:
        entry = roles.setdefault(weight.role, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += TensorSpec(weight.view.shape, weight.view.dtype).nbytes
    return {role: roles[role] for role in names.ROLES if role in roles}


def as_text(found: Inspection) -> str:
    """For people."""
    ranks = f", {found.ranks} tensor-parallel ranks" if found.ranks > 1 else ""
    dtypes = ", ".join(f"{n} x {dtype}" for dtype, n in sorted(found.dtypes.items()))
    lines = [
        f"{found.source}: {found.family}, {found.layout} layout{ranks}",
        f"{found.tensors} tensors ({dtypes}), {found.bytes / 1e9:.2f} GB in {found.files} file(s)",
        ", ".join(f"{COUNTS[key]} {n}" for key, n in found.counts.items() if n),
        ", ".join(f"{key} {n}" for key, n in found.dims.items()),
        "",
        report.table(
            ("role", "tensors", "GB"),
            [(role, str(r["tensors"]), f"{r['bytes'] / 1e9:.3f}") for role, r in found.roles.items()],
        ),
    ]
    lines += [f"note: {note}" for note in found.notes]
    lines += shown([f"anomaly: {anomaly}" for anomaly in found.anomalies])
    return "\n".join(lines if found.anomalies else [*lines, "", "no anomalies"])


def as_json(found: Inspection) -> dict[str, Any]:
    """For --json."""
    return dict(found.__dict__)
