"""What one layer of the original model would say with some of its weights quantized: differences of its output, many at once.

A trial is weights (PT names) and their codecs; a weight that several trials have in the same codec is encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_quant.calibration import forward
from ernie_quant.calibration.forward import DENSE, SHARED, TOKENS_AT_ONCE, expert_of, routing
from ernie_quant.calibration.layer import Linear, gated, rms_norm
from ernie_quant.calibration.model import Model
from ernie_quant.calibration.streams import weights_of

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.threads import ordered
from ernie_quant.views.read import slabs

if TYPE_CHECKING:
    import torch

Trial = Mapping[str, Codec]
POINTS = {"q_proj": forward.QKV, "k_proj": forward.QKV, "v_proj": forward.QKV, "o_proj": forward.O_PROJ}


@dataclass(frozen=True)
class Changed(Model):
    """A model of which some weights are read as they would be stored; `hessians`: of the inputs of codecs that look at them."""

    codecs: Trial = field(default_factory=dict)
    hessians: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: Model, codecs: Trial, hessians: Mapping[str, torch.Tensor] | None = None) -> Changed:
        """`model` with these codecs."""
        return Changed(model.geometry, model.weights, model.files, model.rounds, codecs, hessians or {})

    def tensor(self, name: str) -> torch.Tensor:
        """A whole weight."""
        weight = super().tensor(name)
        return stored(weight, self.codecs[name], self.hessians.get(name)) if name in self.codecs else weight

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of one."""
        weight = super().rows(name, first, last)
        return stored(weight, self.codecs[name]) if name in self.codecs else weight


def stored(weight: torch.Tensor, codec: Codec, hessian: torch.Tensor | None = None) -> torch.Tensor:
    """f32 [out, in] as a program will see it, of f32 [out, in]."""
    import torch

    spec = TensorSpec(tuple(weight.shape), "F32")
    encoder = None if hessian is None else codec.prepare(spec, {"hessian": hessian})
    parts = []
    for first, last in slabs(spec, codec.rows) or [(0, len(weight))]:
        rows = weight[first:last]
        encoded = codec.encode(rows) if encoder is None else {**encoder.once, **encoder.encode(rows)}
        parts.append(codec.decode(encoded).float())
    return torch.cat(parts)


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a layer are what. `fit`: so many first ones are for statistics of the inputs, the others are judged."""

    fit: int
    workers: int
    feedback: bool  # do codecs look at inputs?


def attention_differences(
    model: Model, layer: int, hidden: torch.Tensor, after: torch.Tensor, trials: Sequence[Trial], tokens: Tokens
) -> torch.Tensor:
    """[trials, judged tokens, H]: what attention adds to residuals [windows, tokens, H], less what it does without a change."""
    import torch

    length = hidden.shape[1]
    windows = tokens.fit // length
    hessians = _attention_hessians(model, layer, hidden[:windows]) if tokens.feedback else {}
    place = f"model.layers.{layer}.self_attn"
    known = {f"{place}.{name}.weight": hessians[point] for name, point in POINTS.items() if point in hessians}
    judged = hidden[windows:]

    def difference(trial: Trial) -> torch.Tensor:
        changed = forward.attention(Changed.of(model, trial, known), layer, judged)
        return (changed - after[windows:]).flatten(0, 1)

    return torch.stack(list(ordered(difference, trials, tokens.workers)))


def _attention_hessians(model: Model, layer: int, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Point -> sum of w x' x over tokens."""
    import torch

    found: dict[str, torch.Tensor] = {}
    weight = weights_of(hidden.flatten(0, 1))
    seen = dict.fromkeys((forward.QKV, forward.O_PROJ), 0)

    def observe(point: str, inputs: torch.Tensor, heard: torch.Tensor | None) -> None:
        if point not in seen:
            return
        heavy = inputs * weight[seen[point] : seen[point] + len(inputs), None]
        seen[point] += len(inputs)
        found.setdefault(point, torch.zeros(inputs.shape[1], inputs.shape[1])).addmm_(inputs.T, heavy)

    forward.attention(model, layer, hidden, observe)
    return found


def ffn_differences(
    model: Model, layer: int, after: torch.Tensor, trials: Sequence[Trial], tokens: Tokens
) -> torch.Tensor:  # fmt: skip
    """[trials, judged tokens, H]: what the layer's experts add to residuals [windows, tokens, H] after attention, less what
    they do without a change. One expert is in memory at a time."""
    import torch

    residual = after.flatten(0, 1)
    x = rms_norm(residual, model.norm(f"model.layers.{layer}.post_attention_layernorm"), model.geometry.eps)
    weight = weights_of(residual)
    hessian = (x[: tokens.fit].T @ (x[: tokens.fit] * weight[: tokens.fit, None])) if tokens.feedback else None
    found = torch.zeros(len(trials), len(x) - tokens.fit, x.shape[1])
    for place, rows, heard in _parts(model, layer, residual):
        part = _Part(model, f"model.layers.{layer}.{place}", trials)
        if not part.jobs or not len(rows):
            continue
        part.read(x, rows, heard, weight, hessian, tokens)
        judged = rows >= tokens.fit
        part.add(found, x[rows[judged]], rows[judged] - tokens.fit, heard[judged], tokens.workers)
    return found


def _parts(model: Model, layer: int, residual: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Experts with the tokens that go to them, and how loud they are heard."""
    import torch

    everyone, loud = torch.arange(len(residual)), torch.ones(len(residual))
    if layer not in model.geometry.sparse:
        yield DENSE, everyone, loud
        return
    heard = routing(model, layer, residual, model.norm(f"model.layers.{layer}.post_attention_layernorm"))
    for number in model.experts:
        rows = heard[:, number].nonzero()[:, 0]
        yield expert_of(number), rows, heard[rows, number]
    if model.geometry.shared:
        yield SHARED, everyone, loud


class _Part:
    """gate, up and down of an expert, as they are and in every codec that is tried."""

    def __init__(self, model: Model, place: str, trials: Sequence[Trial]) -> None:
        self.model, self.trials = model, trials
        self.names = [f"{place}.{name}_proj.weight" for name in ("gate", "up", "down")]
        self.jobs = list(dict.fromkeys((n, t[n]) for t in trials for n in self.names if n in t))

    def read(
        self, x: torch.Tensor, rows: torch.Tensor, heard: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor | None,
        tokens: Tokens,
    ) -> None:  # fmt: skip
        """The weights, and what they would be stored as."""
        self.plain = {name: self.model.linear(name.removesuffix(".weight")) for name in self.names}
        hessians = {}
        if hessian is not None:
            fit = rows < tokens.fit
            inner = self._inner(x[rows[fit]], {}) * heard[fit, None]
            hessians = {self.names[0]: hessian, self.names[1]: hessian}
            hessians[self.names[2]] = inner.T @ (inner * weight[rows[fit], None])

        def made(job: tuple[str, Codec]) -> Linear:
            name, codec = job
            known = hessians.get(name)
            seen = known if known is not None and float(known.diagonal().sum()) > 0 else None
            return Linear(stored(self.plain[name].weight, codec, seen), self.plain[name].bias)

        self.made = dict(zip(self.jobs, ordered(made, self.jobs, tokens.workers), strict=True))

    def _of(self, number: int, trial: Trial) -> Linear:
        name = self.names[number]
        return self.made[name, trial[name]] if name in trial else self.plain[name]

    def _inner(self, x: torch.Tensor, trial: Trial) -> torch.Tensor:
        return gated(x, self._of(0, trial), self._of(1, trial))

    def add(self, found: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, heard: torch.Tensor, workers: int) -> None:
        """To `found` [trials, tokens, H], what is said otherwise of x [n, H], inputs of the tokens `rows`."""
        mine = [number for number, trial in enumerate(self.trials) if not trial.keys().isdisjoint(self.names)]
        for first in range(0, len(rows), TOKENS_AT_ONCE):
            chunk = slice(first, first + TOKENS_AT_ONCE)
            inner = self._inner(x[chunk], {})
            said = self._of(2, {})(inner)

            def one(number: int, chunk: slice = chunk, inner: torch.Tensor = inner, said: torch.Tensor = said) -> None:
                trial = self.trials[number]
                first_half = not trial.keys().isdisjoint(self.names[:2])
                other = self._of(2, trial)(self._inner(x[chunk], trial) if first_half else inner)
                found[number].index_add_(0, rows[chunk], (other - said) * heard[chunk, None])

            list(ordered(one, mine, workers))
