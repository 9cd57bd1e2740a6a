"""One weight of the result: its codes from what its inputs are, stored as the result will store it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_quant.calibration import integers
from ernie_quant.calibration.ridge import Seen

from ernie_quant import runtimes
from ernie_quant.codecs import LARGEST_WEIGHT, Codec, Encoder, of_text
from ernie_quant.dtypes import torch_dtype
from ernie_quant.planning.recipe import takes_method
from ernie_quant.planning.steps import Step
from ernie_quant.threads import ordered
from ernie_quant.views.largest import largest
from ernie_quant.writers import ShardWriter

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

ROWS_AT_ONCE = 512  # of a weight, on each thread: a number of its own, so that bits do not depend on how many there are
FEW_BITS = 6.0  # weights with fewer are corrected whether or not others may be changed


@dataclass(frozen=True)
class Tuned:
    """What came of a weight: the part of its output's energy that rounding costs on tokens for judging; was it changed
    though it is not quantized, or beyond its rounding; tokens it was fitted to."""

    name: str
    output_error: float
    fitted: bool
    tokens: int


@dataclass
class Tuner:
    """Makes the weights of one layer, and writes them. `steps`: PT name of a weight -> the step of the result that holds it."""

    steps: Mapping[str, Step]
    runtime: str
    writer: ShardWriter
    workers: int
    fit: bool
    tuned: list[Tuned] = field(default_factory=list)
    once: dict[str, Encoded] = field(default_factory=dict)  # step -> fields of its weight that statistics of the text give
    _encoders: dict[tuple[Codec, int], Encoder | None] = field(default_factory=dict)
    _of: Seen | None = None

    def changes(self, name: str) -> bool:
        """Is the weight quantized, or may it be fitted?"""
        return name in self.steps

    def corrects(self, name: str) -> bool:
        """May it aim at more than its own rounding?"""
        step = self.steps.get(name)
        return step is not None and not self.data_free(name) and (self.fit or step.codec.bits_per_weight(step.spec) < FEW_BITS)

    def data_free(self, name: str) -> bool:
        """Does its codec look at no inputs? It is what it would be without text, and what comes after it is made up for that."""
        step = self.steps[name]
        return not step.kept and not takes_method(step.codec)

    def codec(self, name: str) -> Codec:
        """Of a weight that changes."""
        return self.steps[name].codec

    def needs(self, name: str) -> tuple[str, ...]:
        """What must be known of a text to store it."""
        return of_text(self.codec(name)) if self.changes(name) else ()

    def rounding(self, name: str) -> integers.Rounding | None:
        """What is done to the inputs of a weight that has been stored."""
        step = self.steps[name]
        return integers.rounding(step.codec, self.once.get(step.name, {}))

    def cache(self, name: str) -> integers.Cache | None:
        """The KV cache that is stored with a weight, if there is one."""
        return integers.cache(self.steps[name].codec, self.once[self.steps[name].name]) if self.needs(name) else None

    def tune(
        self, names: Sequence[str], wanted: Sequence[torch.Tensor], seen: Seen, fitted: bool, known: Encoded
    ) -> list[torch.Tensor]:  # fmt: skip
        """Store weights [out, in] with the same inputs, as near to `wanted` as their codecs can; f32, as they will be read.

        `fitted`: `wanted` are not the weights of the source. `known`: what they need beside `seen`. Steps that hold several
        of them must be given all of these.
        """
        import torch

        made: dict[str, torch.Tensor] = {}
        of = dict(zip(names, wanted, strict=True))
        steps = {step.name: step for step in (self.steps[name] for name in names)}
        weighed = self._weighed(list(steps.values()), of)
        for step in steps.values():
            whole = torch.cat([of[name] for name in step.holds]) if len(step.holds) > 1 else of[step.holds[0]]
            stored = self._store(step, whole, seen, fitted, {**known, **weighed.get(step.name, {})})
            made |= zip(step.holds, torch.split(stored, [len(of[name]) for name in step.holds]), strict=True)
        return [made[name] for name in names]

    def _weighed(self, steps: Sequence[Step], of: Mapping[str, torch.Tensor]) -> dict[str, Encoded]:
        """Step -> the largest of its weights and of those with which it has a scale in common, where its codec asks for it."""
        asking = [step for step in steps if LARGEST_WEIGHT in step.codec.needs]
        scale_of = runtimes.find(self.runtime).one_scale
        found: dict[str, torch.Tensor] = {}
        for step in asking:
            for name in step.holds:
                key, mine = scale_of(step.name), largest(of[name])
                found[key] = found[key].maximum(mine) if key in found else mine
        return {step.name: {LARGEST_WEIGHT: found[scale_of(step.name)]} for step in asking}

    def _store(self, step: Step, wanted: torch.Tensor, seen: Seen, fitted: bool, known: Encoded) -> torch.Tensor:
        """f32 [out, in] as it will be read."""

        runtime, once = runtimes.find(self.runtime), self._once(step, known)
        encoded = self._kept(step, wanted) if step.kept else self._encoded(step, wanted, seen, known)
        parts = {
            **runtime.constants(step.name, step.codec, step.spec, once),
            **runtime.pack(step.name, step.codec, encoded),
        }
        for name, tensor in parts.items():
            self.writer.write(name, tensor)
        decoded: torch.Tensor = step.codec.decode({**once, **encoded}).float()
        if step.kept and step.turned:
            decoded = decoded.T
        self.tuned.append(Tuned(step.name, _output_error(wanted, decoded, seen), fitted, seen.tokens))
        return decoded

    def _once(self, step: Step, known: Encoded) -> Encoded:
        """Fields of this weight alone. Weights that have their inputs in common share an encoder, but not these."""
        if step.codec.needs:
            encoder = step.codec.prepare(step.spec, known)
            assert encoder is not None, f"{step.name}: its codec makes nothing of {', '.join(step.codec.needs)}"
            self.once[step.name] = encoder.once
        return self.once.get(step.name, {})

    def _kept(self, step: Step, wanted: torch.Tensor) -> Encoded:
        weight = (wanted.T if step.turned else wanted).to(torch_dtype(step.spec.dtype)).contiguous()
        encoded: Encoded = step.codec.encode(weight)  # it may be one that rounds
        return encoded

    def _encoded(self, step: Step, wanted: torch.Tensor, seen: Seen, known: Encoded) -> Encoded:
        import torch

        encoder = self._encoder(step, seen, known)
        encode = encoder.encode if encoder else step.codec.encode
        size = math.lcm(ROWS_AT_ONCE, step.multiple)
        slabs = list(ordered(encode, torch.split(wanted, size), self.workers))
        return {key: torch.cat([slab[key] for slab in slabs]) for key in slabs[0]}

    def _encoder(self, step: Step, seen: Seen, known: Encoded) -> Encoder | None:
        """One for all weights with the same inputs and form; those of other inputs are dropped. Of its `once`, see `_once`."""
        if LARGEST_WEIGHT in step.codec.needs:  # no two layers have it in common
            return step.codec.prepare(step.spec, known)
        if self._of is not seen:
            self._encoders.clear()
            self._of = seen
        key = (step.codec, step.spec.shape[1])
        if key not in self._encoders:
            self._encoders[key] = step.codec.prepare(step.spec, {"hessian": seen.hessian, **known}) if seen.tokens else None
        return self._encoders[key]


def _output_error(wanted: torch.Tensor, decoded: torch.Tensor, seen: Seen) -> float:
    """sum |z (W - Q)'|^2 / sum |z W'|^2 over the tokens for judging."""
    sample = seen.sample
    heavy = sample.inputs * sample.weight.sqrt()[:, None]
    energy = float((heavy @ wanted.T).pow(2).sum())
    return float((heavy @ (wanted - decoded).T).pow(2).sum()) / energy if energy else 0.0
