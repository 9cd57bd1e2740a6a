"""What quantizing each unit alone costs at the output of the model, measured in one pass over its weights.

Two parts: the error that a codec makes in what its layer adds to the residual (for every unit and codec), and what an error
at that place costs in the end. For the second, streams of hidden states that have been disturbed, each at one place (attention or
FFN of a layer, all of it in about four bits), go with the original through the layers that follow, and KL divergence is taken
of the logits. It grows in proportion to the energy of the error (docs/allocation.md has figures of a real model). Of embeddings
and head every codec has its own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie_quant.calibration import forward
from ernie_quant.calibration.judge import divergences
from ernie_quant.calibration.model import EMBEDDINGS, Model
from ernie_quant.calibration.opened import Opened, Readable
from ernie_quant.calibration.trials import Changed, Tokens, Trial, attention_differences, ffn_differences
from ernie_quant.calibration.windows import Windows

from ernie_quant.names import VISION_EXPERT
from ernie_quant.planning.measured import Disturbed, Sensitivity
from ernie_quant.planning.units import ATTENTION, FFN, VOCABULARY, Unit, Units
from ernie_quant.threads import Progress, default_workers, one_torch_thread, ordered

if TYPE_CHECKING:
    import torch


@dataclass
class _Carried:
    """A stream on its way: its unit and option where it is of one, else its place."""

    layer: int
    place: str
    error: float
    head: Trial
    option: tuple[int, int] | None = None


class Sweep:
    """One pass. `ids` int64 [windows, tokens]: the first `fit` windows are for statistics of inputs, the others are judged."""

    def __init__(self, model: Model, units: Sequence[Unit], ids: torch.Tensor, fit: int, feedback: bool) -> None:
        self.model, self.units, self.ids, self.fit = model, units, ids, fit
        self.tokens = Tokens(fit * ids.shape[1], default_workers(), feedback)
        self.errors: dict[tuple[int, int], float] = {}
        self.carried: list[_Carried] = []
        self.streams = self._begin()

    def _begin(self) -> torch.Tensor:
        """The original, and one stream for every codec of the embeddings."""
        import torch

        streams = [forward.start(self.model, self.ids)]
        for number, unit in self._of(VOCABULARY):
            name = unit.weights[0]
            for index, option in enumerate(unit.options):
                if option.kept:
                    continue
                changes = {name: option.codec}
                embedded = name == f"{EMBEDDINGS}.weight"
                model = Changed.of(self.model, changes) if embedded else self.model
                streams.append(forward.start(model, self.ids[self.fit :]))
                error = relative(streams[-1] - streams[0][self.fit :], streams[0][self.fit :])
                head = changes if self.model.head == name else {}
                self.carried.append(_Carried(-1, VOCABULARY, error, head, (number, index)))
        return torch.cat(streams)

    def _of(self, place: str, layer: int = -1) -> Iterator[tuple[int, Unit]]:
        for number, unit in enumerate(self.units):
            if unit.place == place and unit.layer == layer and unit.role != VISION_EXPERT:
                yield number, unit

    def layer(self, number: int) -> None:
        """All streams one layer further, and one more of each of its places."""
        before = self.streams
        after = self._each(lambda some: forward.attention(self.model, number, some), before)
        own = len(self.ids)
        self.streams = self._disturbed(
            number,
            ATTENTION,
            after,
            lambda t: attention_differences(self.model, number, before[:own], after[:own], t, self.tokens),
        )
        between = self.streams
        out = self._each(lambda some: forward.mlp(self.model, number, some), between)
        self.streams = self._disturbed(
            number, FFN, out, lambda t: ffn_differences(self.model, number, between[:own], t, self.tokens)
        )  # fmt: skip

    def _each(self, work: Callable[[torch.Tensor], torch.Tensor], streams: torch.Tensor) -> torch.Tensor:
        """Streams are shared among threads, each of which reads the layer's weights."""
        import torch

        return torch.cat(list(ordered(work, streams.chunk(self.tokens.workers), self.tokens.workers)))

    def _disturbed(self, layer: int, place: str, streams: torch.Tensor, differences: Any) -> torch.Tensor:
        """Measure the errors of a place; the streams, with those that are disturbed there."""
        import torch

        units = list(self._of(place, layer))
        options = [(n, i) for n, unit in units for i, option in enumerate(unit.options) if not option.kept]
        trials: list[Trial] = [dict.fromkeys(self.units[n].weights, self.units[n].options[i].codec) for n, i in options]
        if not trials:
            return streams
        trials.append({w: unit.options[middle(unit)].codec for _, unit in units for w in unit.weights})
        found = differences(trials)
        original = streams[self.fit : len(self.ids)]
        errors = [relative(one, original.flatten(0, 1)) for one in found]
        self.errors |= dict(zip(options, errors, strict=False))
        self.carried.append(_Carried(layer, place, errors[-1], {}))
        return torch.cat([streams, original + found[-1].view(original.shape)])

    def ended(self) -> list[float]:
        """KL of every stream; where nothing is to be seen rounding alone may make it negative."""
        import torch

        judged = len(self.ids) - self.fit
        original, *others = torch.split(self.streams, [len(self.ids), *[judged] * len(self.carried)])
        models = [Changed.of(self.model, one.head) if one.head else self.model for one in self.carried]
        pairs = [(model, other[:, :-1].flatten(0, 1)) for model, other in zip(models, others, strict=True)]
        found = divergences(self.model, original[self.fit :, :-1].flatten(0, 1), pairs, self.tokens.workers)
        return [max(0.0, kl) for kl in found]


def middle(unit: Unit) -> int:
    """The option in the middle of those that are quantized."""
    return (sum(not option.kept for option in unit.options) - 1) // 2


def relative(difference: torch.Tensor, of: torch.Tensor) -> float:
    """|difference|^2 / |of|^2, the mean over tokens."""
    return float((difference.pow(2).sum(-1) / of.pow(2).sum(-1).clamp(min=1e-30)).mean())


def measure(
    source: Readable, units: Units, text: Windows, *, method: str = "", progress: Progress = lambda _: None
) -> Sensitivity:  # fmt: skip
    """Errors and costs of all options. Raises CheckpointError, TextError or RetryError."""
    import torch

    ids = torch.cat([text.ids[~text.judged], text.ids[text.judged]]) if method else text.ids
    fit = int((~text.judged).sum()) if method else 0
    with one_torch_thread(), source.read() as opened:
        sweep = Sweep(opened.model, units.free, ids, fit, bool(method))
        _stage(opened, source, 0, progress)
        for layer in range(source.geometry.layers):
            sweep.layer(layer)
            _stage(opened, source, layer + 1, progress)
        found = sweep.ended()
        _stage(opened, source, source.geometry.layers + 1, progress)
    errors, costs, gains = _together(units.free, sweep, found)
    forms = {unit.name: [option.codec.form for option in unit.options] for unit in units.free}
    names = [unit.name for unit in units.free]
    whole = [_stand_in(units.free, costs, number) if cost is None else cost for number, cost in enumerate(costs)]
    return Sensitivity(
        source.identity, units.runtime, text.description, method, forms, dict(zip(names, errors, strict=True)),
        dict(zip(names, whole, strict=True)), gains, sum(cost is None for cost in costs),
    )  # fmt: skip


def _stage(opened: Opened, source: Readable, stage: int, progress: Progress) -> None:
    opened.done(stage)
    progress(source.stage_nbytes(stage))


def _together(
    units: Sequence[Unit], sweep: Sweep, found: Sequence[float]
) -> tuple[list[Sequence[float | None]], list[Sequence[float] | None], list[Disturbed]]:  # fmt: skip
    """Errors, costs and gains; no cost of a unit that no text goes through."""
    ended = list(zip(sweep.carried, found, strict=True))
    own = {one.option: kl for one, kl in ended if one.option is not None}
    gains = [Disturbed(one.layer, one.place, one.error, kl) for one, kl in ended if one.option is None]
    per_error = {(gain.layer, gain.place): gain.kl / gain.error if gain.error > 0 else 0.0 for gain in gains}
    errors: list[Sequence[float | None]] = []
    costs: list[Sequence[float] | None] = []
    for number, unit in enumerate(units):
        known = [0.0 if option.kept else sweep.errors.get((number, i)) for i, option in enumerate(unit.options)]
        errors.append(known)
        if unit.place == VOCABULARY:
            costs.append([own.get((number, i), 0.0) for i in range(len(unit.options))])
        elif unit.role == VISION_EXPERT:
            costs.append(None)
        else:
            costs.append([(error or 0.0) * per_error[unit.layer, unit.place] for error in known])
    return errors, costs, gains


def _stand_in(units: Sequence[Unit], costs: Sequence[Sequence[float] | None], number: int) -> Sequence[float]:
    """Of experts for images: what the same codecs cost in those for text of their layer."""
    mine = units[number]
    texts = [(unit, cost) for unit, cost in zip(units, costs, strict=True) if cost is not None and unit.layer == mine.layer]
    by_form = {o.codec.form: c for unit, cost in texts if unit.experts for o, c in zip(unit.options, cost, strict=True)}
    return [by_form.get(option.codec.form, 0.0) for option in mine.options]
