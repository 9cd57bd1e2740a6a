"""One decoder layer of the quantized model, made from what the layers before it really give, aiming at the original's output.

Two streams of hidden states go through the layer (`Streams`). A projection is tuned to its inputs in the quantized stream, and
to an output that also makes up for what went wrong before it:

- q, k, v, gate, up: x is the normed input of the original, x~ of the quantized stream. W + W B, B the ridge fit of x - x~ on
  x~, gives W x from x~.
- o_proj, down_proj: the ridge fit of what their sum with the residual lacks, on their inputs. The experts' down_proj come one
  after the other, each fitted to what those before it have left.

Only tensors that are quantized change, and with `fit` o_proj and the shared experts' down_proj too. One expert's weights are
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_quant.calibration.forward import DENSE, SHARED, TOKENS_AT_ONCE, expert_of, routing
from ernie_quant.calibration.layer import Linear, attend, gated, rms_norm
from ernie_quant.calibration.model import Model
from ernie_quant.calibration.ridge import Seen, fitted
from ernie_quant.calibration.streams import Streams, weights_of
from ernie_quant.calibration.tune import Tuner

if TYPE_CHECKING:
    import torch

FEW_TOKENS = 64  # an expert that fewer tokens to fit to are routed to is shown others
SHOWN = 4096  # so many of them

Watch = Callable[[str], None]  # is told where we are, whenever that has changed


@dataclass
class Layer:
    """A layer on its way. `judged`: bool [tokens], those for judging."""

    model: Model
    number: int
    tuner: Tuner
    judged: torch.Tensor
    watch: Watch
    tokens: dict[int, int] = field(default_factory=dict)  # expert -> tokens of the quantized stream that are routed to it

    def name(self, place: str) -> str:
        """`model.layers.1.mlp.gate`."""
        return f"model.layers.{self.number}.{place}"

    def linear(self, place: str) -> Linear:
        """A projection as it is in the source."""
        return self.model.linear(self.name(place))

    def gains(self, norm: str) -> torch.Tensor:
        """Of a norm."""
        return self.model.norm(self.name(norm))

    def asks(self, question: Callable[[str], bool], *places: str) -> bool:
        """`Tuner.changes` or `Tuner.corrects` of any of these projections."""
        return any(question(f"{self.name(place)}.weight") for place in places)

    def tuned(
        self, places: Sequence[str], sources: Sequence[Linear], seen: Seen, changes: Sequence[torch.Tensor] | None
    ) -> list[Linear]:  # fmt: skip
        """The projections as they will be read. `changes`: the weights that are aimed at, less those of the source."""
        names = [f"{self.name(place)}.weight" for place in places]
        todo = [i for i, name in enumerate(names) if self.tuner.changes(name)]
        if not todo:
            return list(sources)
        wanted = [sources[i].weight if changes is None else sources[i].weight + changes[i] for i in todo]
        stored = self.tuner.tune([names[i] for i in todo], wanted, seen, changes is not None)
        made = list(sources)
        for i, weight in zip(todo, stored, strict=True):
            made[i] = Linear(weight, sources[i].bias)
        return made


def through(layer: Layer, streams: Streams) -> Streams:
    """The streams after the layer; its tuned weights have been stored."""
    shape = streams.original.shape
    original, made = ffn(layer, *attention(layer, streams))
    return Streams(original.view(shape), made.view(shape), streams.judged)


def attention(layer: Layer, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
    """Both residuals [tokens, H] after attention."""
    import torch

    gains, eps = layer.gains("input_layernorm"), layer.model.geometry.eps
    places = [f"self_attn.{x}_proj" for x in "qkv"]
    sources, o = [layer.linear(place) for place in places], layer.linear("self_attn.o_proj")
    before, made_before = streams.original.flatten(0, 1), streams.made.flatten(0, 1)
    x, made_x = rms_norm(before, gains, eps), rms_norm(made_before, gains, eps)
    made = list(sources)
    if layer.asks(layer.tuner.changes, *places):
        seen, change = inputs_seen(layer, places, x, made_x, weights_of(before))
        made = layer.tuned(places, sources, seen, _turned(sources, change))
    length = streams.original.shape[1]
    mixed, made_mixed = _mixed(layer, x, sources, length), _mixed(layer, made_x, made, length)
    after = before + o(mixed)
    del x, made_x, mixed
    weight, made_after = weights_of(after), made_before + o(made_mixed)
    corrected(layer, Member("self_attn.o_proj", torch.arange(len(after)), made_mixed), o, after, made_after, weight)
    return after, made_after


def _mixed(layer: Layer, x: torch.Tensor, qkv: Sequence[Linear], length: int) -> torch.Tensor:
    """The inputs of o_proj [tokens, Q]."""
    import torch

    step = max(1, TOKENS_AT_ONCE // length) * length
    parts = []
    for chunk in x.split(step):
        windows = chunk.unflatten(0, (-1, length))
        parts.append(attend(*(linear(windows) for linear in qkv), layer.model.geometry.attention).flatten(0, 1))
    return torch.cat(parts)


def inputs_seen(
    layer: Layer, places: Sequence[str], x: torch.Tensor, made: torch.Tensor, weight: torch.Tensor
) -> tuple[Seen, torch.Tensor | None]:  # fmt: skip
    """Statistics of the inputs of some projections, and B [in, in] of the fit of x - made on made."""
    corrects = layer.asks(layer.tuner.corrects, *places) and x is not made
    seen = Seen.nothing(x.shape[1], x.shape[1] if corrects else 0)
    for c in chunks(len(x)):
        seen.add(made[c], x[c] - made[c] if corrects else None, weight[c], layer.judged[c])
    return seen, fitted(seen) if corrects else None


def _turned(sources: Sequence[Linear], change: torch.Tensor | None) -> list[torch.Tensor] | None:
    return None if change is None else [source.weight @ change for source in sources]


@dataclass
class Member:
    """A projection whose output is added to the residual of the tokens `rows`: its inputs in the quantized stream, times
    the routing weights that they are heard with. `shown`: inputs of other tokens, where those are too few, and these tokens."""

    place: str
    rows: torch.Tensor
    inputs: torch.Tensor
    shown: tuple[torch.Tensor, torch.Tensor] | None = None


def corrected(
    layer: Layer, member: Member, source: Linear, after: torch.Tensor, made: torch.Tensor, weight: torch.Tensor
) -> None:  # fmt: skip
    """Tune a projection to what `after` has and `made` lacks; `made` [tokens, H] is what it then is."""
    if not layer.asks(layer.tuner.changes, member.place):
        return
    seen = _outputs_seen(layer, member, after, made, weight)
    change = fitted(seen) if seen.cross is not None else None
    (new,) = layer.tuned([member.place], [source], seen, None if change is None else [change])
    difference = (new.weight - source.weight).T
    for c in chunks(len(member.rows)):
        made.index_add_(0, member.rows[c], member.inputs[c] @ difference)


def _outputs_seen(layer: Layer, member: Member, after: torch.Tensor, made: torch.Tensor, weight: torch.Tensor) -> Seen:
    width = member.inputs.shape[1]
    if member.shown is not None:  # nothing is known of what its output should make up for
        inputs, rows = member.shown
        seen = Seen.nothing(width)
        seen.add(inputs, None, weight[rows], layer.judged[rows])
        return seen
    corrects = layer.asks(layer.tuner.corrects, member.place)
    seen = Seen.nothing(width, after.shape[1] if corrects else 0)
    for c in chunks(len(member.rows)):
        rows = member.rows[c]
        seen.add(member.inputs[c], after[rows] - made[rows] if corrects else None, weight[rows], layer.judged[rows])
    return seen


def ffn(layer: Layer, after: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both residuals [tokens, H] after the layer, of those after attention (which are changed)."""
    gains, eps, weight = layer.gains("post_attention_layernorm"), layer.model.geometry.eps, weights_of(after)
    y, made_y = rms_norm(after, gains, eps), rms_norm(made, gains, eps)
    parts = list(_parts(layer, after, made, gains))
    places = [f"{part.place}.{name}_proj" for part in parts for name in ("gate", "up")]
    seen, change = None, None
    if layer.asks(layer.tuner.changes, *places):
        seen, change = inputs_seen(layer, places, y, made_y, weight)
    members = [member for part in parts if (member := _first_half(layer, part, after, made, y, made_y, seen, change))]
    for member in members:
        layer.watch(member.place)
        corrected(layer, member, layer.linear(member.place), after, made, weight)
    return after, made


@dataclass
class _Part:
    """Experts that tokens go to: rows and routing weights in the original, and in the quantized stream."""

    place: str
    rows: torch.Tensor
    heard: torch.Tensor
    made_rows: torch.Tensor
    made_heard: torch.Tensor


def _parts(layer: Layer, after: torch.Tensor, made: torch.Tensor, gains: torch.Tensor) -> Iterator[_Part]:
    """Routed experts, then the shared ones; or the dense layer."""
    import torch

    everyone, loud = torch.arange(len(after)), torch.ones(len(after))
    geometry = layer.model.geometry
    if layer.number not in geometry.sparse:
        yield _Part(DENSE, everyone, loud, everyone, loud)
        return
    heard, made_heard = (routing(layer.model, layer.number, tokens, gains) for tokens in (after, made))
    for number in layer.model.experts:
        rows, made_rows = heard[:, number].nonzero()[:, 0], made_heard[:, number].nonzero()[:, 0]
        layer.tokens[number] = len(made_rows)
        yield _Part(expert_of(number), rows, heard[rows, number], made_rows, made_heard[made_rows, number])
    if geometry.shared:
        yield _Part(SHARED, everyone, loud, everyone, loud)


def _first_half(
    layer: Layer, part: _Part, after: torch.Tensor, made: torch.Tensor, y: torch.Tensor, made_y: torch.Tensor,
    seen: Seen | None, change: torch.Tensor | None,
) -> Member | None:  # fmt: skip
    """Add what an expert says in both streams, its gate and up tuned, its down as it was; its down, if that is to be tuned."""
    import torch

    layer.watch(part.place)
    places = [f"{part.place}.{name}_proj" for name in ("gate", "up", "down")]
    gate, up, down = (layer.linear(place) for place in places)
    _say(after, part.rows, _inner(y, part.rows, part.heard, gate, up), part.heard, down)
    if seen is not None:
        gate, up = layer.tuned(places[:2], (gate, up), seen, _turned((gate, up), change))
    inputs = _inner(made_y, part.made_rows, part.made_heard, gate, up)
    _say(made, part.made_rows, inputs, part.made_heard, down)
    if not layer.asks(layer.tuner.changes, places[2]):
        return None
    member = Member(places[2], part.made_rows, inputs)
    if int((~layer.judged[part.made_rows]).sum()) < FEW_TOKENS:
        rows = torch.arange(0, len(made_y), -(-len(made_y) // SHOWN))
        member.shown = (_inner(made_y, rows, torch.ones(len(rows)), gate, up), rows)
    return member


def _inner(y: torch.Tensor, rows: torch.Tensor, heard: torch.Tensor, gate: Linear, up: Linear) -> torch.Tensor:
    """The inputs of down_proj [rows, M], times what each is heard with."""
    import torch

    inner = torch.empty(len(rows), len(gate.weight))
    for c in chunks(len(rows)):
        inner[c] = gated(y[rows[c]], gate, up) * heard[c, None]
    return inner


def _say(out: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, heard: torch.Tensor, down: Linear) -> None:
    for c in chunks(len(rows)):
        said = inner[c] @ down.weight.T
        out.index_add_(0, rows[c], said if down.bias is None else said + heard[c, None] * down.bias)


def chunks(tokens: int) -> Iterator[slice]:
    """So many at a time."""
    for first in range(0, tokens, TOKENS_AT_ONCE):
        yield slice(first, first + TOKENS_AT_ONCE)
