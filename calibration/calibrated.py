"""A plan whose quantized weights are made layer after layer, from text that runs through them.

Layers are in order, each from what the quantized layers before it give (`walk`); after every one of them the run can be
stopped. What is left then is to write the files of the result, which takes these weights as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.calibration import forward, walk
from ernie_quant.calibration.model import Model, geometry_of
from ernie_quant.calibration.opened import Readable
from ernie_quant.calibration.state import State, said_of
from ernie_quant.calibration.streams import Streams
from ernie_quant.calibration.targets import Layer
from ernie_quant.calibration.tokenizer import BESIDE, VOCABULARIES, tokenizer_of
from ernie_quant.calibration.tune import Tuner
from ernie_quant.calibration.windows import windows

from ernie_quant.planning.fitting import by_layer
from ernie_quant.planning.steps import Plan, Step, with_made
from ernie_quant.threads import Watch, one_torch_thread
from ernie_quant.weights.plain import FIXES, resolve

if TYPE_CHECKING:
    import torch


def calibrated(plan: Plan, place: Path, workers: int, watch: Watch) -> Plan:
    """The plan with the weights that calibration made; `place`: a folder for what is kept between runs.

    Raises TextError, CheckpointError, ConfigError or AnotherPlanError.
    """
    import torch

    assert plan.calibration is not None
    source = readable(plan)
    todo = by_layer(plan, plan.calibration.fit)
    state, last = State(place), max(todo)
    plan.source.bring(path for path in plan.source.extra_files if path.name in (*VOCABULARIES, *BESIDE))
    text = windows(tokenizer_of(plan.source.folder), plan.calibration.source, plan.calibration.tokens, seed=plan.calibration.seed)
    ids, fit = torch.cat([text.ids[~text.judged], text.ids[text.judged]]), int((~text.judged).sum())
    state.begin(ids, fit)
    first = state.next(last)
    if first <= last:
        with one_torch_thread(), torch.no_grad(), source.read(range(first + 1 if first else 0, last + 2)) as opened:
            streams = state.load(first, fit) if first else _start(opened.model, ids, fit)
            for layer in range(first, last + 1):
                where = Where(watch, layer, last + 1, opened.model)
                streams = _through(opened.model, layer, streams, todo.get(layer, []), plan, state, workers, where, layer < last)
                opened.done(layer + 1)
    made = {name: of for layer, steps in todo.items() for name, of in state.made(layer, steps, plan.runtime).items()}
    how = {"method": plan.calibration.method, "fit": plan.calibration.fit}
    said = {**text.description, **how, "layers": [_shown(state.said(layer)) for layer in range(last + 1)]}
    return replace(with_made(plan, made), calibrated=said)


@dataclass
class Where:
    """Tells how much of all layers is done, and what is being done."""

    watch: Watch
    layer: int
    layers: int
    model: Model
    moves: int = 0

    def moved(self, place: str) -> None:
        """To a projection or an expert; those of a layer with experts are visited twice."""
        visits = 2 * (len(self.model.experts) + 1) if self.layer in self.model.geometry.sparse else 2
        self.watch(
            (self.layer + min(self.moves / visits, 1.0)) / self.layers, f"layer {self.layer + 1} of {self.layers}: {place}"
        )
        self.moves += 1


def readable(plan: Plan) -> Readable:
    """The source as a model. Raises ConfigError."""
    table = resolve(plan.source, frozenset(FIXES))
    return Readable(plan.source, table, geometry_of(table))


def _start(model: Model, ids: torch.Tensor, fit: int) -> Streams:
    hidden = forward.start(model, ids)
    return Streams(hidden, hidden, fit)


def _through(
    model: Model, layer: int, streams: Streams, steps: Sequence[Step], plan: Plan, state: State, workers: int,
    where: Where, more: bool,
) -> Streams:  # fmt: skip
    """The streams after a layer, which is finished then."""
    if not steps:
        after = forward.through(model, layer, streams.original)
        made = after if streams.same else forward.through(model, layer, streams.made)
        streams = Streams(after, made, streams.fit)
        state.finish(layer, streams, said_of(layer, streams, [], {}), more)
        return streams
    assert plan.calibration is not None
    by_name = {name: step for step in steps for name in step.holds}
    with state.writer(layer, steps) as writer:
        tuner = Tuner(by_name, plan.runtime, writer, workers, plan.calibration.fit)
        now = Layer(model, layer, tuner, streams.fit_tokens, where.moved)
        streams = walk.through(now, streams)
        writer.close()
    state.finish(layer, streams, said_of(layer, streams, tuner.tuned, now.tokens, now.lent), more)
    return streams


def _shown(said: Mapping[str, Any]) -> dict[str, Any]:
    """What of a layer stands in report.json; weights have rows of their own there."""
    return {key: value for key, value in said.items() if key != "tuned" and value != []}
