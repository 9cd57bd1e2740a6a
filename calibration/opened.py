"""A checkpoint opened as a model: plain or quantized, in a folder or on a hub, layer after layer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ernie_quant.calibration import integers
from ernie_quant.calibration.model import EMBEDDINGS, HEAD, LAST_NORM, Geometry, Model, geometry_of, model_of

from ernie_quant.checkpoint import Checkpoint, Download
from ernie_quant.errors import PlanError
from ernie_quant.names import VISION_EXPERT, Weight
from ernie_quant.sources import open_source
from ernie_quant.views.build import refs
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import spec_of
from ernie_quant.weights.claims import evidence
from ernie_quant.weights.plain import FIXES, Resolved, resolve
from ernie_quant.weights.stored import resolve_quantized

LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Readable:
    """A checkpoint whose names and shapes have been found right; no data are read yet.

    Its stages are 0, the embeddings; 1 to `layers`, the layers; and one more, the head. `rounds`: as `Model` has it.
    """

    checkpoint: Checkpoint
    table: Resolved
    geometry: Geometry
    rounds: bool = True

    @cached_property
    def stages(self) -> list[list[Weight]]:
        """The weights of the text path that each stage reads."""
        found: list[list[Weight]] = [[] for _ in range(self.geometry.layers + 2)]
        own = any(weight.name == f"{HEAD}.weight" for weight in self.table.weights)
        for weight in self.table.weights:
            if weight.role == VISION_EXPERT:
                continue
            if layer := LAYER.match(weight.name):
                found[int(layer[1]) + 1].append(weight)
            elif weight.name == f"{EMBEDDINGS}.weight":
                found[0].append(weight)
                found[-1] += [] if own else [weight]
            elif weight.name == f"{LAST_NORM}.weight" or weight.name.startswith(f"{HEAD}."):
                found[-1].append(weight)
        return found

    @property
    def identity(self) -> dict[str, str]:
        """Names it without saying where it lies; `weights` is the same for every plain form of one model's shapes.

        sha256 of config.json, and of name, shape and role of every weight.
        """
        lines = "".join(f"{w.name} {w.view.shape} {w.role}\n" for w in self.table.weights)
        config = json.dumps(self.checkpoint.config, sort_keys=True)
        hashed = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in (("config", config), ("weights", lines))}
        place = self.checkpoint
        return {"name": place.title, "address": place.address, "revision": place.revision, **hashed}

    @property
    def integers(self) -> str:
        """For people: what of few bits it is computed with, beside its weights, and whether that is simulated."""
        said = integers.named(weight.view for stage in self.stages for weight in stage)
        return said and f"{said}, {'simulated' if self.rounds else 'left out'}"

    @property
    def nbytes(self) -> int:
        """Bytes of decoded weights that a pass reads: what its progress adds up to."""
        return sum(self.stage_nbytes(stage) for stage in range(len(self.stages)))

    def stage_nbytes(self, stage: int) -> int:
        """Of one stage."""
        return sum(spec_of(weight.view).nbytes for weight in self.stages[stage])

    @contextmanager
    def read(self, stages: range | None = None) -> Iterator[Opened]:
        """Its files are open, or on their way: those of some stages, or all. Raises CheckpointError or RetryError."""
        asked = range(len(self.stages)) if stages is None else stages
        needs = [
            list(dict.fromkeys(ref.file for w in stage for ref in refs(w.view))) if number in asked else []
            for number, stage in enumerate(self.stages)
        ]
        with self.checkpoint.download(needs) as download, Files(download.stamps, download.path) as files:
            yield Opened(model_of(self.table, files, rounds=self.rounds), files, download)
            files.check()


@dataclass(frozen=True)
class Opened:
    """A model whose weights can be read."""

    model: Model
    files: Files
    download: Download

    def done(self, stage: int) -> None:
        """Its weights are read no more."""
        self.download.done(stage)


def readable(source: Path | str, *, links: bool = False, rounds: bool = True) -> Readable:
    """The checkpoint at `source`; `rounds` as `Model` has it. Raises CheckpointError, ConfigError, PlanError, HubError or
    RetryError."""
    return of_checkpoint(open_source(source, links=links), rounds=rounds)


def of_checkpoint(checkpoint: Checkpoint, *, rounds: bool = True) -> Readable:
    """One that is open. Raises ConfigError or PlanError."""
    table = resolve_quantized(checkpoint) if evidence(checkpoint) else resolve(checkpoint, frozenset(FIXES))
    if table.problems:
        raise PlanError(f"{checkpoint.folder}: has {len(table.problems)} problem(s)", table.problems)
    return Readable(checkpoint, table, geometry_of(table), rounds)
