"""The forward pass of many windows, a layer at a time and in it an expert at a time: only one expert's weights are in memory.

hidden: float32 [windows, tokens, H]. Tokens go through a projection in chunks, so that what lies between two of them (the
widths of an expert or of attention) is bounded whatever the number of windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from ernie_quant.calibration.layer import Linear, attend, gated, heads, rms_norm, rotated, route
from ernie_quant.calibration.model import EMBEDDINGS, LAST_NORM, Model

from ernie_quant.errors import TextError
from ernie_quant.views.kinds import spec_of
from ernie_quant.views.read import slabs

if TYPE_CHECKING:
    import torch

TOKENS_AT_ONCE = 4096
QKV, KEYS, VALUES, O_PROJ = "self_attn.qkv", "self_attn.k", "self_attn.v", "self_attn.o_proj"
DENSE, SHARED, ROUTER = "mlp", "mlp.shared_experts", "mlp.gate"


def expert_of(number: int) -> str:
    """Where in a layer an expert is."""
    return f"mlp.experts.{number}"


class Observe(Protocol):
    """Is shown what goes into the projections of a layer, chunk after chunk in the order of the tokens.

    `point`: `self_attn.qkv`, `self_attn.o_proj`, `PLACE.gate_up` and `PLACE.down_proj` where PLACE is `mlp` (dense),
    `mlp.shared_experts` or `mlp.experts.N`; `mlp.gate`, the router, which sees all tokens before any expert sees its own;
    and, not inputs but what a cache holds, `self_attn.k` (rotated) and `self_attn.v`. `inputs`: [tokens, width].
    `heard`: routing weights [tokens] of an expert, of those tokens that are routed to it; None elsewhere.
    """

    def __call__(self, point: str, inputs: torch.Tensor, heard: torch.Tensor | None, /) -> None:
        """One chunk."""
        ...


def start(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings [windows, tokens, H] of ids [windows, tokens], of which a slab is read at a time. Raises TextError."""
    import torch

    name, rows = f"{EMBEDDINGS}.weight", model.geometry.vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise TextError(f"token ids are {int(ids.min())} to {int(ids.max())}, the model has 0 to {rows - 1}: not its tokenizer")
    found = torch.empty(*ids.shape, model.geometry.hidden_size)
    for first, last in slabs(spec_of(model.weights[name].view)):
        inside = (ids >= first) & (ids < last)
        if inside.any():
            found[inside] = model.rows(name, first, last)[ids[inside] - first]
    return found


def through(
    model: Model, layer: int, hidden: torch.Tensor, observe: Observe | None = None, *, all_experts: bool = False
) -> torch.Tensor:  # fmt: skip
    """All windows one layer further; `hidden` itself is left as it is.

    `all_experts`: show every expert every token (heard 0 where it is not asked); the result is the same.
    """
    after = attention(model, layer, hidden, observe)
    return mlp(model, layer, after, observe, all_experts=all_experts)


def attention(model: Model, layer: int, hidden: torch.Tensor, observe: Observe | None = None) -> torch.Tensor:
    """The residual after attention."""
    import torch

    place, eps = f"model.layers.{layer}", model.geometry.eps
    gains = model.norm(f"{place}.input_layernorm")
    q, k, v, o = (model.linear(f"{place}.self_attn.{name}_proj") for name in "qkvo")
    cache = model.cache(layer)
    after = torch.empty_like(hidden)
    for some in _windows_at_once(hidden):
        x = rms_norm(hidden[some], gains, eps)
        keys, values = k(x), v(x)
        mixed = attend(q(x), keys, values, model.geometry.attention, cache)
        if observe is not None:
            _show_attention(model, observe, x, keys, values, mixed)
        after[some] = hidden[some] + o(mixed)
    return after


def _show_attention(
    model: Model, observe: Observe, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mixed: torch.Tensor
) -> None:  # fmt: skip
    shape = model.geometry.attention
    cached = rotated(heads(keys, shape), shape).transpose(1, 2).flatten(2)
    for point, inputs in ((QKV, x), (KEYS, cached), (VALUES, values), (O_PROJ, mixed)):
        observe(point, inputs.flatten(0, 1), None)


def mlp(
    model: Model, layer: int, after: torch.Tensor, observe: Observe | None = None, *, all_experts: bool = False
) -> torch.Tensor:  # fmt: skip
    """The residual after the layer: dense, or routed and shared experts one after the other."""
    import torch

    place = f"model.layers.{layer}"
    gains, tokens = model.norm(f"{place}.post_attention_layernorm"), after.flatten(0, 1)
    out = tokens.clone()
    sparse, whole = layer in model.geometry.sparse, torch.arange(len(tokens))
    if name := DENSE if not sparse else SHARED if model.geometry.shared else "":
        _add(out, Expert.read(model, f"{place}.{name}"), name, tokens, gains, model.geometry.eps, whole, None, observe)
    if sparse:
        heard = routing(model, layer, tokens, gains, observe)
        for number in model.experts:
            asked = whole if all_experts and observe is not None else heard[:, number].nonzero()[:, 0]
            name = expert_of(number)
            if len(asked):
                expert = Expert.read(model, f"{place}.{name}")
                _add(out, expert, name, tokens, gains, model.geometry.eps, asked, heard[asked, number], observe)
    return out.view_as(after)


def routing(
    model: Model, layer: int, tokens: torch.Tensor, gains: torch.Tensor, observe: Observe | None = None
) -> torch.Tensor:  # fmt: skip
    """Routing weights [tokens, E] of residuals [tokens, H]."""
    import torch

    assert model.geometry.routing is not None
    router, bias = model.router(layer)
    heard = []
    for chunk in torch.split(tokens, TOKENS_AT_ONCE):
        x = rms_norm(chunk, gains, model.geometry.eps)
        if observe is not None:
            observe(ROUTER, x, None)
        heard.append(route(x, router, bias, model.geometry.routing))
    return torch.cat(heard)


class Expert:
    """gate, up and down of an expert, of the shared ones or of a dense layer."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate, self.up, self.down = gate, up, down

    @staticmethod
    def read(model: Model, place: str) -> Expert:
        """`model.layers.1.mlp.experts.0`. Raises CheckpointError."""
        return Expert(*(model.linear(f"{place}.{name}_proj") for name in ("gate", "up", "down")))


def _add(
    out: torch.Tensor, expert: Expert, name: str, tokens: torch.Tensor, gains: torch.Tensor, eps: float, asked: torch.Tensor,
    heard: torch.Tensor | None, observe: Observe | None,
) -> None:  # fmt: skip
    """Add what it says about the tokens `asked` (numbers), as loud as it is heard."""
    for at in range(0, len(asked), TOKENS_AT_ONCE):
        rows = asked[at : at + TOKENS_AT_ONCE]
        loud = None if heard is None else heard[at : at + TOKENS_AT_ONCE]
        x = rms_norm(tokens[rows], gains, eps)
        inner = gated(x, expert.gate, expert.up)
        if observe is not None:
            observe(f"{name}.gate_up", x, loud)
            observe(f"{name}.down_proj", inner, loud)
        said = expert.down(inner)
        out.index_add_(0, rows, said if loud is None else said * loud[:, None])


def _windows_at_once(hidden: torch.Tensor) -> Iterator[slice]:
    """Windows of about TOKENS_AT_ONCE tokens together."""
    step = max(1, TOKENS_AT_ONCE // hidden.shape[1])
    for first in range(0, len(hidden), step):
        yield slice(first, first + step)


def last_norm(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """What the head sees of residuals [tokens, H]."""
    return rms_norm(tokens, model.norm(LAST_NORM), model.geometry.eps)
