"""What a projection is tuned to: statistics of its inputs in the quantized stream, and what its output should make up for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_quant.calibration import integers
from ernie_quant.calibration.forward import TOKENS_AT_ONCE
from ernie_quant.calibration.layer import Linear
from ernie_quant.calibration.model import Model
from ernie_quant.calibration.ridge import Seen, fitted
from ernie_quant.calibration.tune import Tuner

from ernie_quant.codecs import RoundsInputs

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


@dataclass
class Layer:
    """A layer on its way. The first `fit` tokens are to fit to, the others to judge by."""

    model: Model
    number: int
    tuner: Tuner
    fit: int
    watch: Callable[[str], None]  # is told of the projections that it comes to
    tokens: dict[int, int] = field(default_factory=dict)  # expert -> tokens of the quantized stream that are routed to it
    lent: set[int] = field(default_factory=set)  # experts whose activation scales are of tokens that go to others, too

    def name(self, place: str) -> str:
        """`model.layers.1.mlp.gate`."""
        return f"model.layers.{self.number}.{place}"

    def linear(self, place: str) -> Linear:
        """A projection as it is in the source."""
        return self.model.linear(self.name(place))

    def gains(self, norm: str) -> torch.Tensor:
        """Of a norm."""
        return self.model.norm(self.name(norm))

    def of(self, rows: torch.Tensor) -> int:
        """How many of some tokens (their numbers, rising) are to fit to."""
        return int((rows < self.fit).sum())

    def asks(self, question: Callable[[str], bool], *places: str) -> bool:
        """`Tuner.changes` or `Tuner.corrects` of any of these projections."""
        return any(question(f"{self.name(place)}.weight") for place in places)

    def needs(self, place: str) -> tuple[str, ...]:
        """`Tuner.needs`."""
        return self.tuner.needs(f"{self.name(place)}.weight")

    def largest(self, place: str) -> Largest | None:
        """To be shown the inputs of a projection, if that is needed to store it."""
        codec = self.tuner.codec(f"{self.name(place)}.weight") if integers.LARGEST in self.needs(place) else None
        return Largest(codec) if isinstance(codec, RoundsInputs) else None

    def tuned(
        self, places: Sequence[str], sources: Sequence[Linear], seen: Seen, changes: Sequence[torch.Tensor] | None,
        known: Encoded | None = None,
    ) -> list[Linear]:  # fmt: skip
        """The projections as they will be read. `changes`: what is aimed at less the source, of those that aim at more.

        `known`: what their codecs need beside `seen`.
        """
        names = [f"{self.name(place)}.weight" for place in places]
        made = list(sources)
        for corrects, aims in ((False, None), (True, changes)):
            todo = [i for i, name in enumerate(names) if self.tuner.changes(name) and self.tuner.corrects(name) is corrects]
            wanted = [sources[i].weight if aims is None else sources[i].weight + aims[i] for i in todo]
            stored = self.tuner.tune([names[i] for i in todo], wanted, seen, aims is not None, known or {})
            for i, weight in zip(todo, stored, strict=True):
                made[i] = Linear(weight, sources[i].bias, self.tuner.rounding(names[i]))
        return made


def inputs_seen(
    layer: Layer, places: Sequence[str], x: torch.Tensor, made: torch.Tensor, weight: torch.Tensor
) -> tuple[Seen, torch.Tensor | None]:  # fmt: skip
    """Statistics of the inputs of some projections, and B [in, in] of the fit of x - made on made."""
    corrects = layer.asks(layer.tuner.corrects, *places) and x is not made
    seen = Seen.nothing(x.shape[1], x.shape[1] if corrects else 0)
    for c in chunks(len(x)):
        seen.add(made[c], x[c] - made[c] if corrects else None, weight[c], min(max(layer.fit - c.start, 0), len(weight[c])))
    return seen, fitted(seen) if corrects else None


def turned(sources: Sequence[Linear], change: torch.Tensor | None) -> list[torch.Tensor] | None:
    """What the fit of their inputs makes of projections: W B for each."""
    return None if change is None else [source.weight @ change for source in sources]


@dataclass
class Member:
    """A projection whose output is added to the residual of the tokens `rows`: its inputs in the quantized stream, times
    the routing weights `heard`, where there are any. `shown`: inputs of other tokens, where those are too few, and these tokens.
    `largest`: of the inputs that its kernel rounds, if it does."""

    place: str
    rows: torch.Tensor
    inputs: torch.Tensor
    heard: torch.Tensor | None = None
    shown: tuple[torch.Tensor, torch.Tensor] | None = None
    largest: Largest | None = None

    def counted(self, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs as they come to it, and how much they count, by the weights of all tokens."""
        for c in chunks(len(self.rows)):
            heard = 1.0 if self.heard is None else self.heard[c]
            yield self._unheard(c), weight[self.rows[c]] * heard**2
        if self.shown is not None:
            yield self.shown[0], weight[self.shown[1]]

    def _unheard(self, chunk: slice) -> torch.Tensor:
        return self.inputs[chunk] if self.heard is None else self.inputs[chunk] / self.heard[chunk, None]

    def lost(self, rounds: integers.Rounding, chunk: slice) -> torch.Tensor:
        """What rounding adds to inputs [tokens, in]: it is done before they are heard as loud as they are."""
        rounded = rounds(self._unheard(chunk))
        return (rounded if self.heard is None else rounded * self.heard[chunk, None]) - self.inputs[chunk]


def corrected(
    layer: Layer, member: Member, source: Linear, after: torch.Tensor, made: torch.Tensor, weight: torch.Tensor
) -> None:  # fmt: skip
    """Tune a projection to what `after` has and `made` lacks; `made` [tokens, H] is what it then is."""
    if not layer.asks(layer.tuner.changes, member.place):
        return
    seen = _outputs_seen(layer, member, after, made, weight)
    change = fitted(seen) if seen.cross is not None else None
    known = None
    if member.largest is not None:
        known = member.largest.known(member.counted(weight), source.weight.square().sum(0))
    (new,) = layer.tuned([member.place], [source], seen, None if change is None else [change], known)
    difference = (new.weight - source.weight).T
    for c in chunks(len(member.rows)):
        more = member.inputs[c] @ difference
        if new.rounds is not None:
            more += member.lost(new.rounds, c) @ new.weight.T
        add(made, some(member.rows, c, made), more)


def _outputs_seen(layer: Layer, member: Member, after: torch.Tensor, made: torch.Tensor, weight: torch.Tensor) -> Seen:
    width = member.inputs.shape[1]
    if member.shown is not None:  # nothing is known of what its output should make up for
        inputs, rows = member.shown
        seen = Seen.nothing(width)
        seen.add(inputs, None, weight[rows], layer.of(rows))
        return seen
    corrects = layer.asks(layer.tuner.corrects, member.place)
    seen = Seen.nothing(width, after.shape[1] if corrects else 0)
    for c in chunks(len(member.rows)):
        part = some(member.rows, c, made)
        seen.add(member.inputs[c], after[part] - made[part] if corrects else None, weight[part], layer.of(member.rows[c]))
    return seen


@dataclass
class Largest:
    """The largest |x| that a kernel rounds, of all tokens that it is shown; and how much less loses least of them."""

    codec: RoundsInputs
    value: float = 0.0

    def add(self, inputs: torch.Tensor) -> None:
        """More inputs [tokens, in] of the projection, as it is given them."""
        if len(inputs):
            self.value = max(self.value, float(self.codec.seen(inputs).abs().max()))

    def known(self, shown: Iterable[tuple[torch.Tensor, torch.Tensor]], columns: torch.Tensor) -> Encoded:
        """For `Codec.prepare`. `shown`: the inputs [tokens, in] again, a chunk at a time, and how much each token counts.

        `columns` [in]: sums of the weight's squares. To cut off what is above a part of the largest makes finer steps for all
        else; the part that costs the output least, as if errors of different inputs had nothing to do with each other.
        """
        import torch

        ratios = self.codec.ratios
        lost, scales = torch.zeros(len(ratios), dtype=torch.float64), self.value * torch.tensor(ratios)
        for inputs, weight in shown if self.value and len(ratios) > 1 else ():
            for i, scale in enumerate(scales):
                lost[i] += float((self.codec.rounded(inputs, scale[None]) - inputs).square() @ columns @ weight)
        return {integers.LARGEST: scales[int(lost.argmin())][None]}


def some(rows: torch.Tensor, chunk: slice, of: torch.Tensor) -> torch.Tensor | slice:
    """A chunk of tokens (their numbers, rising), of a tensor [tokens, …]; a slice, which copies nothing, where they are all."""
    return chunk if len(rows) == len(of) else rows[chunk]


def add(out: torch.Tensor, rows: torch.Tensor | slice, more: torch.Tensor) -> None:
    """To some rows."""
    if isinstance(rows, slice):
        out[rows] += more
    else:
        out.index_add_(0, rows, more)


def chunks(tokens: int) -> Iterator[slice]:
    """So many at a time."""
    for first in range(0, tokens, TOKENS_AT_ONCE):
        yield slice(first, first + TOKENS_AT_ONCE)
