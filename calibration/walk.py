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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.calibration import integers
from ernie_quant.calibration.forward import DENSE, SHARED, TOKENS_AT_ONCE, expert_of, routing
from ernie_quant.calibration.layer import Linear, attend, gated, heads, rms_norm, rotated
from ernie_quant.calibration.ridge import Seen
from ernie_quant.calibration.streams import Streams, between, weights_of
from ernie_quant.calibration.targets import Largest, Layer, Member, add, chunks, corrected, inputs_seen, some, turned

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

FEW_TOKENS = 64  # an expert that fewer tokens to fit to are routed to is shown others
SHOWN = 4096  # so many of them


def through(layer: Layer, streams: Streams) -> Streams:
    """The streams after the layer; its tuned weights have been stored."""
    shape = streams.original.shape
    original, made = ffn(layer, *attention(layer, streams))
    return Streams(original.view(shape), made.view(shape), streams.fit)


def attention(layer: Layer, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
    """Both residuals [tokens, H] after attention."""
    import torch

    gains, eps = layer.gains("input_layernorm"), layer.model.geometry.eps
    places = [f"self_attn.{x}_proj" for x in "qkv"]
    sources, o = [layer.linear(place) for place in places], layer.linear("self_attn.o_proj")
    before, made_before = streams.original.flatten(0, 1), streams.made.flatten(0, 1)
    x, made_x = rms_norm(before, gains, eps), rms_norm(made_before, gains, eps)
    made, length = list(sources), streams.original.shape[1]
    if layer.asks(layer.tuner.changes, *places):
        seen, change = inputs_seen(layer, places, x, made_x, weights_of(before))
        known = _cached(layer, made_x, sources, length) if integers.KEY in layer.needs(places[1]) else {}
        known |= _largest(layer, places[0], made_x, weights_of(before), sources)
        made = layer.tuned(places, sources, seen, turned(sources, change), known)
    cache = layer.tuner.cache(f"{layer.name(places[1])}.weight") if layer.needs(places[1]) else None
    mixed, made_mixed = _mixed(layer, x, sources, length), _mixed(layer, made_x, made, length, cache)
    after = before + o(mixed)
    del x, made_x, mixed
    weight, made_after = between(weights_of(before), weights_of(after)), made_before + o(made_mixed)
    member = Member("self_attn.o_proj", torch.arange(len(after)), made_mixed, largest=layer.largest("self_attn.o_proj"))
    if member.largest is not None:
        member.largest.add(made_mixed)
    corrected(layer, member, o, after, made_after, weight)
    return after, made_after


def _largest(layer: Layer, place: str, made_x: torch.Tensor, weight: torch.Tensor, sources: Sequence[Linear]) -> Encoded:
    """What the codec of projections that all tokens come to needs to know of their inputs; nothing, if it rounds none."""
    largest = layer.largest(place)
    if largest is None:
        return {}
    for c in chunks(len(made_x)):
        largest.add(made_x[c])
    columns = sum((source.weight.square().sum(0) for source in sources[1:]), sources[0].weight.square().sum(0))
    return largest.known(((made_x[c], weight[c]) for c in chunks(len(made_x))), columns)


def _windows(x: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Some of them at a time, [windows, length, H]."""
    import torch

    for chunk in torch.split(x, max(1, TOKENS_AT_ONCE // length) * length):
        yield chunk.reshape(-1, length, chunk.shape[1])


def _mixed(
    layer: Layer, x: torch.Tensor, qkv: Sequence[Linear], length: int, cache: integers.Cache | None = None
) -> torch.Tensor:  # fmt: skip
    """The inputs of o_proj [tokens, Q]."""
    import torch

    parts = []
    for windows in _windows(x, length):
        q, k, v = (linear(windows) for linear in qkv)
        parts.append(attend(q, k, v, layer.model.geometry.attention, cache).flatten(0, 1))
    return torch.cat(parts)


def _cached(layer: Layer, x: torch.Tensor, qkv: Sequence[Linear], length: int) -> Encoded:
    """The largest |k| (after RoPE) and |v| [KV] of inputs in the quantized stream, for the scales of an int8 cache.

    By the source's weights: scales are stored with q, k and v, before it is known what becomes of these. 8 bits change k and v
    by less than a percent, and a value that is so much beyond its scale is off by one step at most.
    """
    import torch

    shape, found = layer.model.geometry.attention, torch.zeros(2, layer.model.geometry.attention.kv_channels)
    for windows in _windows(x, length):
        keys = rotated(heads(qkv[1](windows), shape), shape).transpose(1, 2).flatten(2)
        for i, values in enumerate((keys, qkv[2](windows))):
            found[i] = found[i].maximum(values.abs().amax((0, 1)))
    return {integers.KEY: found[0], integers.VALUE: found[1]}


def ffn(layer: Layer, after: torch.Tensor, made: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both residuals [tokens, H] after the layer, of those after attention (which are changed)."""

    gains, eps, weight = layer.gains("post_attention_layernorm"), layer.model.geometry.eps, weights_of(after)
    y, made_y = rms_norm(after, gains, eps), rms_norm(made, gains, eps)
    parts = list(_parts(layer, after, made, gains))
    places = [f"{part.place}.{name}_proj" for part in parts for name in ("gate", "up")]
    seen, change = None, None
    if layer.asks(layer.tuner.changes, *places):
        seen, change = inputs_seen(layer, places, y, made_y, weight)
    members = [member for part in parts if (member := _first_half(layer, part, after, made, y, made_y, seen, change, weight))]
    weight = between(weight, weights_of(after))
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
    number: int | None = None  # of a routed expert


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
        yield _Part(expert_of(number), rows, heard[rows, number], made_rows, made_heard[made_rows, number], number)
    if geometry.shared:
        yield _Part(SHARED, everyone, loud, everyone, loud)


def _first_half(
    layer: Layer, part: _Part, after: torch.Tensor, made: torch.Tensor, y: torch.Tensor, made_y: torch.Tensor,
    seen: Seen | None, change: torch.Tensor | None, weight: torch.Tensor,
) -> Member | None:  # fmt: skip
    """Add what an expert says in both streams, its gate and up tuned, its down as it was; its down, if that is to be tuned."""
    import torch

    layer.watch(part.place)
    places = [f"{part.place}.{name}_proj" for name in ("gate", "up", "down")]
    gate, up, down = (layer.linear(place) for place in places)
    _say(after, part.rows, _inner(y, part.rows, part.heard, gate, up), part.heard, down)
    others = None  # tokens that it is shown because few are its own
    if layer.of(part.made_rows) < FEW_TOKENS:
        others = torch.arange(0, len(made_y), -(-len(made_y) // SHOWN))
    if seen is not None:
        known = _largest_inputs(layer, part, places[0], made_y, others, weight, (gate, up))
        gate, up = layer.tuned(places[:2], (gate, up), seen, turned((gate, up), change), known)
    largest = layer.largest(places[2])
    inputs = _inner(made_y, part.made_rows, part.made_heard, gate, up, largest)
    _say(made, part.made_rows, inputs, part.made_heard, down)
    if not layer.asks(layer.tuner.changes, places[2]):
        return None
    member = Member(places[2], part.made_rows, inputs, heard=part.made_heard)
    if others is not None:
        member.shown = (_inner(made_y, others, torch.ones(len(others)), gate, up, largest), others)
    if largest is not None:
        member.largest = largest
        _lend(layer, part, others)
    return member


def _largest_inputs(
    layer: Layer, part: _Part, place: str, made_y: torch.Tensor, others: torch.Tensor | None, weight: torch.Tensor,
    sources: tuple[Linear, Linear],
) -> Encoded | None:  # fmt: skip
    """What the codec of gate and up (`sources`) needs to know of its inputs: the expert's own tokens, as they come to it.

    Routing weights are no part of it: kernels multiply by these after down_proj (FastDeploy: moe_expert_reduce).
    """
    largest = layer.largest(place)
    if largest is None:
        return None
    shown = [rows[c] for rows in (part.made_rows, others) if rows is not None for c in chunks(len(rows))]
    for rows in shown:
        largest.add(made_y[rows])
    _lend(layer, part, others)
    columns = sources[0].weight.square().sum(0) + sources[1].weight.square().sum(0)
    return largest.known(((made_y[rows], weight[rows]) for rows in shown), columns)


def _lend(layer: Layer, part: _Part, others: torch.Tensor | None) -> None:
    if others is not None and part.number is not None:
        layer.lent.add(part.number)


def _inner(
    y: torch.Tensor, rows: torch.Tensor, heard: torch.Tensor, gate: Linear, up: Linear, largest: Largest | None = None
) -> torch.Tensor:  # fmt: skip
    """The inputs of down_proj [rows, M], times what each is heard with. `largest` is shown them before that."""
    import torch

    inner = torch.empty(len(rows), len(gate.weight))
    for c in chunks(len(rows)):
        said = gated(y[some(rows, c, y)], gate, up)
        if largest is not None:
            largest.add(said)
        inner[c] = said * heard[c, None]
    return inner


def _say(out: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, heard: torch.Tensor, down: Linear) -> None:
    for c in chunks(len(rows)):
        said = inner[c] @ down.weight.T
        add(out, some(rows, c, out), said if down.bias is None else said + heard[c, None] * down.bias)
