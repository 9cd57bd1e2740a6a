"""A checkpoint against its architecture's table: every stored tensor in canonical form, and what disagrees."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ernie_quant import archs, stored
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import PlanError
from ernie_quant.names import NameMap, Weight

QUANTIZED_PARTS = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".quant_weight", ".qweight", ".super_scales")


@dataclass(frozen=True)
class Table:
    """A checkpoint with its architecture: names resolved to canonical tensors, and what disagreed."""

    arch: ModuleType
    config: dict[str, Any]  # flat
    map: NameMap
    weights: list[Weight]
    problems: list[str]


def resolve(checkpoint: Checkpoint, fixes: frozenset[str] = frozenset()) -> Table:
    """Names and shapes of a checkpoint against its architecture's table. Raises ConfigError."""
    arch = archs.find(checkpoint.config)
    config = arch.flat(checkpoint.config)
    name_map: NameMap = arch.name_map(config, list(checkpoint.refs))
    weights, problems = name_map.resolve(checkpoint, fixes)
    return Table(arch, config, name_map, weights, [*checkpoint.anomalies, *problems])


def resolve_quantized(checkpoint: Checkpoint) -> Table:
    """The same for a quantized checkpoint: its weights are decoded when they are read. Raises PlanError or ConfigError."""
    target = stored.runtime_of(checkpoint)
    entries, problems = stored.open_stored(checkpoint, target)
    arch, name_map = archs.find(checkpoint.config), stored.table_of(checkpoint, target)
    config = {key: value for key, value in arch.flat(checkpoint.config).items() if key not in stored.QUANTIZED}
    return Table(arch, config, name_map, stored.canonical(entries, name_map), [*checkpoint.anomalies, *problems])


def refuse_quantized(source: Checkpoint) -> None:
    """Quantizing twice multiplies the errors. Raises PlanError."""
    said = next((k for k in ("quantization_config", "compression_config") if source.config.get(k)), None)
    said = said or ("is_quantized" if source.config.get("is_quantized") is True else None)
    part = next((n for n in source.refs if n.endswith(QUANTIZED_PARTS)), None)
    if said or part:
        evidence = f"config.json has {said}" if said else f"it holds {part}"
        raise PlanError(f"{source.folder}: is quantized already ({evidence}); start from the original checkpoint", [])
