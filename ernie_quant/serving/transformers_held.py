"""What a checkpoint holds for every parameter that transformers has in memory: it keeps the experts of a layer in one tensor.

Names, shapes and codecs are those that every command sees (weights.stored, weights.layouts), so that a missing part, a wrong
shape or a promise that config.json does not keep is found before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import Keep
from ernie_quant.errors import CheckpointError
from ernie_quant.names import EXPERT_ROLES, VISION
from ernie_quant.sources import open_source
from ernie_quant.weights.layouts import FUSED, FUSED_VL
from ernie_quant.weights.stored import Stored, open_stored, runtime_of, table_of

Group: TypeAlias = tuple[Stored, ...]  # gate and up, or the one weight


@dataclass(frozen=True)
class Held:
    """Parameter, by its name in memory -> its weights: a group for every expert, or the only one."""

    groups: Mapping[str, Sequence[Group]]

    def of(self, parameter: str) -> Sequence[Group]:
        """Those of a parameter, of a model with a head or without. Raises CheckpointError."""
        found = self.groups.get(parameter) or self.groups.get(f"model.{parameter}")
        if not found:
            raise CheckpointError(f"{parameter}: the checkpoint has nothing for this parameter of transformers")
        return found

    def packed(self, parameter: str) -> bool:
        """Are they quantized, all alike?"""
        codecs = {stored.codec for group in self.of(parameter) for stored in group}
        return len(codecs) == 1 and not isinstance(codecs.pop(), Keep)

    def stored(self) -> Iterator[Stored]:
        """All weights."""
        return (stored for groups in self.groups.values() for group in groups for stored in group)


def is_expert(stored: Stored) -> bool:
    """Is it a routed expert's weight?"""
    return stored.rule.role in EXPERT_ROLES


def checkpoint_of(files: Sequence[str] | None) -> Checkpoint:
    """The checkpoint whose `files` transformers is about to load. Raises ErnieQuantError."""
    if not files:
        raise CheckpointError("a state_dict of quantized weights cannot be loaded by itself; give from_pretrained the checkpoint")
    return open_source(Path(files[0]).parent, links=True)


def held(checkpoint: Checkpoint) -> Held:
    """What it holds. Raises ErnieQuantError for the first disagreement of names, shapes and config.json."""
    target = runtime_of(checkpoint)
    entries, problems = open_stored(checkpoint, target)
    if problems:
        more = f"; {len(problems) - 1} more, which `ernie-quant inspect` lists" if problems[1:] else ""
        raise CheckpointError(f"{checkpoint.folder}: {problems[0]}{more}")
    there, table = {entry.name: entry for entry in entries}, table_of(checkpoint, target)
    layout = FUSED_VL if any(rule.role == VISION for rule in table.rules) else FUSED
    groups: dict[str, list[Group]] = {}
    for row in table.rows():
        for tensor in layout.stored(row):
            if all(name in there for name in tensor.pt):
                groups.setdefault(tensor.name, []).append(tuple(there[name] for name in tensor.pt))
    return Held(groups)
