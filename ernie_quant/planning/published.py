"""A quantized checkpoint as `plan` sees it: stored bytes of every weight, whoever made it, and how ranks may share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_quant import archs, plugins, runtimes
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.planning.held import Item
from ernie_quant.runtimes import Linear, Runtime
from ernie_quant.views.kinds import spec_of
from ernie_quant.weights import forms
from ernie_quant.weights.stored import linears_of, open_stored, runtime_of, table_of


@dataclass(frozen=True)
class Published:
    """What is stored; `ours`: every tensor was understood, so that it can be resharded."""

    title: str
    target: Runtime
    config: Mapping[str, Any]
    dims: Mapping[str, int]
    items: tuple[Item, ...]
    linears: Sequence[Linear]
    ours: bool


def read(source: Checkpoint) -> Published:
    """Look at it. Raises PlanError or ConfigError."""
    arch = archs.find(source.config)
    config = arch.flat(source.config)
    try:
        target = runtime_of(source)
        entries, problems = open_stored(source, target)
    except (PlanError, ConfigError):
        table, stored = forms.stored_bytes(source)
        found = tuple(Item(*entry) for entry in stored)
        container = "quantization" in (source.config.get("quantization_config") or {})
        target = runtimes.find("fastdeploy" if container or len(source.ranks) > 1 else "vllm")
        return Published(forms.method(source), target, config, table.dims, found, (), False)
    if problems:
        raise PlanError(f"{source.folder}: {len(problems)} problem(s) in the checkpoint", problems)
    items = tuple(
        Item(entry.name, entry.rule.role, sum(spec_of(view).nbytes for view in entry.parts.values())) for entry in entries
    )
    title, dims = forms.method(source, plugins.name_of(target, runtimes)), table_of(source, target).dims
    return Published(title, target, config, dims, items, linears_of(entries), True)
