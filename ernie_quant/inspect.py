"""What a checkpoint is: layout, dimensions, where its bytes are, and everything that is wrong with it. Headers only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ernie_quant import names, plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.sources import open_source
from ernie_quant.weights.plain import Resolved, resolve


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
    checkpoint = open_source(source)
    table = resolve(checkpoint, fixes)
    refs = [ref for rank in checkpoint.ranks for ref in rank.refs.values()]
    dtypes: dict[str, int] = {}
    for ref in refs:
        dtypes[ref.spec.dtype] = dtypes.get(ref.spec.dtype, 0) + 1
    counts = {key: len(table.map.ids[key]) for key in COUNTS if key in table.map.ids}
    return Inspection(
        str(source), plugins.name_of(table.arch), table.layout.title,
        len(checkpoint.ranks), sum(len(r.files) for r in checkpoint.ranks), len(refs), checkpoint.nbytes,
        dtypes, dict(table.map.dims), counts, _roles(table), tuple(table.problems), (*checkpoint.notes, *table.notes),
    )  # fmt: skip


# ids of an architecture, and what a person calls their number
COUNTS = {
    "layer": "layers", "dense": "dense layers", "moe": "MoE layers", "expert": "experts (text)",
    "vision_expert": "experts (vision)", "shared": "layers with shared experts", "mtp": "MTP blocks", "block": "vision blocks",
}  # fmt: skip


def _roles(table: Resolved) -> dict[str, dict[str, int]]:
    """Tensors (as PT counts them) and bytes by role."""
    roles: dict[str, dict[str, int]] = {}
    for weight in table.weights:
        entry = roles.setdefault(weight.role, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += TensorSpec(weight.view.shape, weight.view.dtype).nbytes
    return {role: roles[role] for role in names.ROLES if role in roles}
