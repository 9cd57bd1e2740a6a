"""What a calibration leaves behind after every layer, so that it can be stopped at any moment and go on there.

In a folder of its own in the private state of a result: `layer-00003.safetensors` has a layer's weights as the result will
store them, `layer-00003.json` what is said of them, `streams-00004.safetensors` the hidden states before the next layer. A layer
is finished when its JSON is there; what is half-written is not looked at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.calibration.streams import Streams
from ernie_quant.calibration.tune import Tuned

from ernie_quant import writers
from ernie_quant.checkpoint import Extent, TensorRef, TensorSpec
from ernie_quant.disk import PARTIAL, fsync, fsync_folder, write_file
from ernie_quant.errors import AnotherPlanError, CheckpointError
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.planning.steps import Made, Step
from ernie_quant.reporting.calibration import LENT
from ernie_quant.views.build import leaf
from ernie_quant.weights.stored import Stored
from ernie_quant.writers import ShardWriter

if TYPE_CHECKING:
    import torch

IDS = "tokens.json"


@dataclass(frozen=True)
class State:
    """The folder."""

    path: Path

    def begin(self, ids: torch.Tensor, fit: int) -> None:
        """Is what was begun here calibration on the same tokens? Raises AnotherPlanError."""
        self.path.mkdir(exist_ok=True)
        digest = hashlib.sha256(ids.numpy().tobytes() + str(fit).encode()).hexdigest()
        place = self.path / IDS
        if not place.is_file():
            write_file(place, dumps({"sha256": digest}).encode())
        elif read_object(place).get("sha256") != digest:
            raise AnotherPlanError(
                f"{self.path.parent.parent}: its calibration was begun on other tokens: the tokenizer of the source has changed;"
                " --restart begins anew"
            )

    def weights(self, layer: int) -> Path:
        """Of a layer."""
        return self.path / f"layer-{layer:05d}{_format().EXTENSION}"

    def _said(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.json"

    def _streams(self, layer: int) -> Path:
        return self.path / f"streams-{layer:05d}{_format().EXTENSION}"

    def said(self, layer: int) -> dict[str, Any]:
        """What `finish` was given. Raises CheckpointError."""
        return read_object(self._said(layer))

    def next(self, last: int) -> int:
        """The layer to go on with: 0, or one before which streams are there; after `last` where nothing is left."""
        done = 0
        while done <= last and self._said(done).is_file():
            done += 1
        return done if done > last or self._streams(done).is_file() else 0

    def writer(self, layer: int, steps: Sequence[Step]) -> AbstractContextManager[ShardWriter]:
        """Of the weights of these steps; whole ones, in this order."""
        specs = specs_of(steps)
        return ShardWriter(self.weights(layer), specs, _format().lay_out(specs, {}))

    def finish(self, layer: int, streams: Streams, said: Mapping[str, Any], more: bool) -> None:
        """After this the layer is not done again. `more`: there are further layers."""
        if more:
            self._save(layer + 1, streams)
        write_file(self._said(layer), dumps(said).encode())
        self._streams(layer).unlink(missing_ok=True)

    def _save(self, layer: int, streams: Streams) -> None:
        from safetensors.torch import save_file

        place = self._streams(layer)
        partial = place.with_name(place.name + PARTIAL)
        tensors = {"original": streams.original.contiguous()}
        if not streams.same:
            tensors["made"] = streams.made.contiguous()
        save_file(tensors, partial)
        with partial.open("rb") as file:
            fsync(file.fileno())
        os.replace(partial, place)
        fsync_folder(self.path)

    def load(self, layer: int, fit: int) -> Streams:
        """The hidden states before a layer. Raises CheckpointError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self._streams(layer))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._streams(layer)}: cannot be read: {error}; --restart begins anew") from None
        return Streams(tensors["original"], tensors.get("made", tensors["original"]), fit)

    def made(self, layer: int, steps: Sequence[Step], runtime: str) -> dict[str, Made]:
        """The weights of a finished layer; fitted ones that stayed as they were are left out. Raises CheckpointError."""
        specs, file = specs_of(steps), self.weights(layer)
        starts = _format().lay_out(specs, {}).starts
        tuned = {row["name"]: Tuned(**row) for row in self.said(layer)["tuned"]}
        found = {}
        for step in steps:
            of = tuned[step.name]
            if not step.kept or of.fitted:
                assert step.row is not None
                refs = {n: TensorRef(n, p.spec, file, (Extent(starts[n], p.spec.nbytes),)) for n, p in step.parts.items()}
                views = {name: leaf(ref) for name, ref in refs.items()}
                stored = Stored(step.name, step.row, step.spec, step.codec, runtime, views)
                found[step.name] = Made(stored, of.output_error, of.fitted, of.tokens)
        return found


def _format() -> writers.Format:
    """In which weights wait for the files of the result."""
    return writers.find("safetensors")


def specs_of(steps: Sequence[Step]) -> dict[str, TensorSpec]:
    """All that the steps store, in the order of a file."""
    return _format().order({name: part.spec for step in steps for name, part in step.parts.items()})


def said_of(
    layer: int, streams: Streams, tuned: Sequence[Tuned], tokens: Mapping[int, int], lent: Iterable[int] = ()
) -> dict[str, Any]:  # fmt: skip
    """What is remembered of a layer. `lent`: experts whose activation scales are of tokens that go to others, too."""
    return {
        "layer": layer,
        "drift": streams.drift(),
        "tuned": [asdict(row) for row in tuned],
        "expert_tokens": [tokens[number] for number in sorted(tokens)],
        LENT: sorted(lent),
    }
