"""What a checkpoint is: layout, dimensions, where its bytes are, and everything that is wrong with it. Headers only."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_quant import archs, names, plugins
from ernie_quant.checkpoint import Checkpoint, TensorSpec
from ernie_quant.names import NameMap
from ernie_quant.sources import open_source
from ernie_quant.weights import claims, forms
from ernie_quant.weights.plain import Resolved, resolve


@dataclass(frozen=True, repr=False)
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
    quantized: str = ""  # by which method, as config.json says
    forms: tuple[dict[str, Any], ...] = ()  # role, form, weights, numel, nbytes, bits_per_weight of a quantized one

    def __repr__(self) -> str:
        wrong = f"{len(self.anomalies)} anomalies" if self.anomalies else "no anomalies"
        how = f", {self.quantized}" if self.quantized else ""
        sizes = f"{self.tensors} tensors, {self.bytes / 1e9:.2f} GB"
        return f"<Inspection of {self.source}: {self.family}, {self.layout} layout{how}, {sizes}, {wrong}>"


def inspect(source: Path | str, fixes: frozenset[str] = frozenset(), *, links: bool = False) -> Inspection:
    """Look at a checkpoint, plain or quantized. Raises CheckpointError or ConfigError where nothing more can be said."""
    checkpoint = open_source(source, links=links)
    if claims.evidence(checkpoint):
        return _of_quantized(str(source), checkpoint)
    table = resolve(checkpoint, fixes)
    return Inspection(
        **_facts(str(source), checkpoint), family=plugins.name_of(table.arch, archs), layout=table.layout.title,
        dims=dict(table.map.dims), counts=_counts(table.map), roles=_roles(table), anomalies=tuple(table.problems),
        notes=(*claims.notes_of(checkpoint), *table.notes),
    )  # fmt: skip


def _of_quantized(source: str, checkpoint: Checkpoint) -> Inspection:
    found = forms.describe(checkpoint)
    roles: dict[str, dict[str, int]] = {}
    for form in found.forms:
        entry = roles.setdefault(form.role, {"tensors": 0, "bytes": 0})
        entry["tensors"] += form.weights
        entry["bytes"] += form.nbytes
    return Inspection(
        **_facts(source, checkpoint), family=plugins.name_of(archs.find(checkpoint.config), archs), layout=found.layout.title,
        dims=dict(found.table.dims), counts=_counts(found.table), roles=roles,
        anomalies=(*checkpoint.anomalies, *found.problems), notes=(*checkpoint.notes, *found.notes), quantized=found.title,
        forms=tuple({**asdict(form), "bits_per_weight": round(form.bits_per_weight, 4)} for form in found.forms),
    )  # fmt: skip


def _facts(source: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What does not depend on what the tensors are."""
    refs = [ref for rank in checkpoint.ranks for ref in rank.refs.values()]
    return {
        "source": source, "ranks": len(checkpoint.ranks), "files": sum(len(r.files) for r in checkpoint.ranks),
        "tensors": len(refs), "bytes": checkpoint.nbytes, "dtypes": dict(Counter(ref.spec.dtype for ref in refs)),
    }  # fmt: skip


# ids of an architecture, and what a person calls their number
COUNTS = {
    "layer": "layers", "dense": "dense layers", "moe": "MoE layers", "expert": "experts (text)",
    "vision_expert": "experts (vision)", "shared": "layers with shared experts", "mtp": "MTP blocks", "block": "vision blocks",
}  # fmt: skip


def _counts(table: NameMap) -> dict[str, int]:
    return {key: len(table.ids[key]) for key in COUNTS if key in table.ids}


def _roles(table: Resolved) -> dict[str, dict[str, int]]:
    """Tensors (as PT counts them) and bytes by role."""
    roles: dict[str, dict[str, int]] = {}
    for weight in table.weights:
        entry = roles.setdefault(weight.role, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += TensorSpec(weight.view.shape, weight.view.dtype).nbytes
    return {role: roles[role] for role in names.ROLES if role in roles}
