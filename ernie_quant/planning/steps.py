"""What a plan is made of: a step for every weight, a shard for every file, and the job that writes one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie_quant import runtimes, writers
from ernie_quant.checkpoint import Checkpoint, Stamp, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.devices import CPU
from ernie_quant.names import Row
from ernie_quant.planning.built_in import SHARD_BYTES as SHARD_BYTES
from ernie_quant.planning.calibration import Calibration
from ernie_quant.planning.carried import target_of
from ernie_quant.planning.identity import Identity
from ernie_quant.planning.recipe import Recipe
from ernie_quant.reporting.rows import TensorReport
from ernie_quant.runtimes import Part, Spread
from ernie_quant.views import build
from ernie_quant.views.kinds import View
from ernie_quant.views.read import slabs
from ernie_quant.weights.layouts import Layout
from ernie_quant.weights.stored import Stored


@dataclass(frozen=True)
class Made:
    """A weight that calibration has made, and where it lies in the form in which the result stores it.

    `output_error`: the part of its output's energy that its rounding costs, on tokens for judging. `fitted`: it aims at
    more than the weight of the source. `tokens`: of its inputs that were looked at.
    """

    stored: Stored
    output_error: float
    fitted: bool
    tokens: int


@dataclass(frozen=True)
class Step:
    """One weight of the result: where it comes from, what is done to it, what is stored.

    `statistics`: of its inputs, for codecs that look at them. `weighed`: of it and of the weights with which it shares a scale,
    from the source. `row`: of the table. `made`: it need not be encoded any more.
    """

    name: str
    role: str
    view: View
    spec: TensorSpec
    codec: Codec
    parts: Mapping[str, Part]
    sources: tuple[str, ...]
    multiple: int = 1  # rows that must stay together in a slab
    group: str = ""  # steps of one group, one after the other, stay in one file
    statistics: Mapping[str, View] = field(default_factory=dict)
    row: Row | None = None
    made: Made | None = None
    weighed: Mapping[str, View] = field(default_factory=dict)

    @property
    def holds(self) -> tuple[str, ...]:
        """PT names of the weights that are joined in it along their outputs."""
        return (self.name,) if self.row is None or self.name in self.row.pt else self.row.pt

    @property
    def turned(self) -> bool:
        """Is it a kept weight that is stored as [in, out]?"""
        paddle = self.row is not None and self.name == self.row.paddle and self.row.rule.op.transpose
        return paddle and self.kept

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(part.spec.nbytes for part in self.parts.values())

    @property
    def quantized(self) -> bool:
        """Does it change? What is kept, but rounded, does too."""
        return self.codec != KEEP

    @property
    def kept(self) -> bool:
        """Is it stored as a plain tensor?"""
        return isinstance(self.codec, Keep)

    def slabs(self) -> list[tuple[int, int]]:
        """Ranges of rows that together are the tensor."""
        return slabs(self.spec, self.multiple)


@dataclass(frozen=True)
class Shard:
    """One file of the result (its name may have a subfolder); `specs` in the order in which the tensors lie in it.

    `after`: files that must be finished before this one is begun.
    """

    filename: str
    steps: tuple[Step, ...]
    specs: Mapping[str, TensorSpec]
    after: tuple[str, ...] = ()

    @property
    def nbytes_in(self) -> int:
        """Bytes of the tensors that it is made from."""
        return sum(step.spec.nbytes for step in self.steps)

    @cached_property
    def needs(self) -> tuple[Path, ...]:
        """Files of the source that it is made from, in order of their first use."""
        views = (view for step in self.steps for view in (step.view, *step.weighed.values()))
        return tuple(dict.fromkeys(ref.file for view in views for ref in build.refs(view)))

    @property
    def statistics_files(self) -> set[Path]:
        """Files that statistics, or weights that calibration has made, are read from; they lie on this machine."""
        made = [view for step in self.steps if step.made for view in step.made.stored.parts.values()]
        views = [*made, *(view for step in self.steps for view in step.statistics.values())]
        return {ref.file for view in views for ref in build.refs(view)}

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it reads."""
        return (*self.needs, *sorted(self.statistics_files - {*self.needs}))

    @property
    def stacks(self) -> dict[str, int]:
        """Stored tensors that hold several weights, and how many."""
        return stacks_of(self.steps)


def stacks_of(steps: Iterable[Step]) -> dict[str, int]:
    """Stored tensor -> number of weights that are stacked in it."""
    return dict(Counter(name for step in steps for name, part in step.parts.items() if part.index is not None))


@dataclass(frozen=True)
class ShardJob:
    """All that writing one file needs: values that can be sent to another process."""

    shard: Shard
    runtime: str
    metadata: Mapping[str, Any]
    stamps: Mapping[Path, Stamp]  # of the files it reads, as far as they may change
    device: str = CPU  # by its name for people: `cuda` means all that the process sees
    once: bool = False  # must its files leave the page cache, because the run's would fill it?


@dataclass(frozen=True)
class Plan:
    """All that a run needs to know."""

    source: Checkpoint
    runtime: str
    layout: Layout
    recipe: Recipe
    shards: tuple[Shard, ...]
    dims: Mapping[str, int]
    config: Mapping[str, Any]
    copies: tuple[Path, ...]  # files of the source that are carried along, as they are at the end
    tp_sizes: tuple[int, ...]
    notes: tuple[str, ...]
    identity: Identity
    shard_bytes: int = SHARD_BYTES
    gpus: Mapping[str, Spread] = field(default_factory=dict)  # memory of a GPU -> how the fewest of them share the result
    weights: int = 0  # elements of the model, where the steps do not tell
    reports: tuple[TensorReport, ...] | None = None  # of an earlier run whose weights are only moved here
    calibration: Calibration | None = None  # what text quantized weights are fitted to
    calibrated: Mapping[str, Any] | None = None  # what came of that: as it stands in report.json
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what the files say of themselves
    quantized_by: Plan | None = None  # the plan whose result, which is not kept, this one shares among ranks

    @property
    def origin(self) -> Checkpoint:
        """What a user calls the source."""
        return (self.quantized_by or self).source

    @property
    def copied(self) -> dict[str, Path]:
        """File of the result -> that of the source."""
        return {target_of(self.origin.name_of(path)): path for path in self.copies}

    @property
    def format(self) -> writers.Format:
        """The file format of the result."""
        return writers.find(runtimes.find(self.runtime).FORMAT)

    def metadata_of(self, shard: Shard) -> Mapping[str, Any]:
        """What one file says of itself."""
        inside = self.folders[shard.filename.rpartition("/")[0]]
        return self.format.metadata_of(self.metadata, [other.specs for other in inside], inside.index(shard))

    @property
    def steps(self) -> list[Step]:
        """All steps, in order of the result's names."""
        return [step for shard in self.shards for step in shard.steps]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(step.nbytes for step in self.steps)

    @property
    def nbytes_in(self) -> int:
        """Bytes of the tensors that it is made from, as a run counts them."""
        return sum(shard.nbytes_in for shard in self.shards)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the result's weight files and of what is carried along, as large as it is now."""
        weights = sum(self.format.lay_out(shard.specs, self.metadata_of(shard)).nbytes for shard in self.shards)
        return weights + sum(self.origin.extra_files.get(path, 0) for path in self.copies)

    @property
    def folders(self) -> dict[str, list[Shard]]:
        """Subfolder ("" for the root) -> its files."""
        folders: dict[str, list[Shard]] = {}
        for shard in self.shards:
            folders.setdefault(shard.filename.rpartition("/")[0], []).append(shard)
        return folders


def with_made(plan: Plan, made: Mapping[str, Made]) -> Plan:
    """The plan whose steps of these names need not be encoded any more."""
    shards = [
        replace(shard, steps=tuple(replace(step, made=made.get(step.name)) for step in shard.steps)) for shard in plan.shards
    ]
    return replace(plan, shards=tuple(shards))


def in_order(shards: Sequence[Shard]) -> list[Shard]:
    """The same, each behind those that it must come after; otherwise as they are."""
    placed: list[Shard] = []
    left = list(shards)
    while left:
        names = {shard.filename for shard in left}
        ready = next((shard for shard in left if not names & {*shard.after}), None)
        assert ready is not None, f"{left[0].filename}: waits for itself"
        placed.append(ready)
        left.remove(ready)
    return placed
