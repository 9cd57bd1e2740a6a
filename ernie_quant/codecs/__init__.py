"""Codecs, one file each: mathematics on a weight [out, in], no bytes and no names of any runtime.

A file defines one frozen dataclass that derives from `DataFree` or follows `Codec`, `CODEC` (that class) and `EXAMPLES`
(instances that the contract tests take through every promise). Options of a recipe rule are the fields of the dataclass.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from ernie_quant import plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import PlanError
from ernie_quant.measure import Difference, squares

if TYPE_CHECKING:
    import torch

    Encoded: TypeAlias = dict[str, torch.Tensor]


LARGEST_WEIGHT = "largest_weight"  # a statistic of no text: of the weight and those with which it has a scale in common, f32 [1]


class Encoder(Protocol):
    """Encodes one weight; large, so that few are alive at a time."""

    @property
    def once(self) -> Encoded:
        """Fields of the encoded weight that are the same for all its slabs."""
        ...

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The other fields, for a slab of rows [rows, in]."""
        ...


class Codec(Protocol):
    """A way to store a weight. Frozen: what it does is decided when it is made. A codec opens no file."""

    @property
    def rows(self) -> int:
        """Rows that must be encoded together: a slab has a multiple of it."""
        ...

    @property
    def version(self) -> int:
        """Raised whenever `encode` gives other fields for the same weight: a begun result must not go on with it."""
        ...

    @property
    def rate(self) -> float:
        """Million weights that one core encodes in a second, as `benchmarks/codec_rates.py` measured; 0 if nobody has."""
        ...

    @property
    def decodes_to(self) -> str:
        """The dtype of decoded weights; a kept one has its own."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics without which a weight cannot be stored: fields of `Encoder.once` are made of them, which `encode` omits.

        All are of the text that its inputs come from, but for LARGEST_WEIGHT, which the plan itself sees to.
        """
        ...

    @property
    def form(self) -> str:
        """What a file shows of it: `int4, group 128`, whatever way a scale was chosen. Equal forms are stored alike."""
        ...

    def describe(self) -> str:
        """For people: `int4, group 128, mse`."""
        ...

    def problem(self, spec: TensorSpec) -> str | None:
        """Why a weight [out, in] cannot be stored this way, with what would fit; None if it can."""
        ...

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Fields of the encoded weight; all have out (or out / rows) as their first dimension, but those of `Encoder.once`."""
        ...

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """Stored bits per element, scales included."""
        ...

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """What encodes the slabs of a weight [out, in] where statistics of its inputs matter; None where `encode` does.

        Raises ErnieQuantError for statistics without one that the codec `needs`; None where there are none at all.
        """
        ...

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The fields for a weight [out, in], or for a slab of its rows; those that statistics are needed for are left out."""
        ...

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """`encode`, and what `decode` will have lost: `measure.squares` of it, in whatever order."""
        ...

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The weight that a runtime will see. This is what reports measure. What is left out of `encode` is not asked for."""
        ...

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """`encoded` with the codes nearest to `weight` at its scales; for `decode(encoded)` they are the same again."""
        ...


@runtime_checkable
class MeasuringEncoder(Encoder, Protocol):
    """One that sees what is lost while it encodes, as `Codec.measured`."""

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """`encode`, and what `decode` will have lost."""
        ...


@runtime_checkable
class RoundsInputs(Protocol):
    """A codec whose weights are multiplied with inputs of few bits, by a scale that is stored with the weight."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Parts of the largest input that are tried as `largest`, if there is more than one: what is above them is cut off."""
        ...

    @property
    def inputs(self) -> str:
        """What it is computed with, for people: `int8 activations`."""
        ...

    def seen(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the kernel rounds of inputs [tokens, in]; the largest of it is the statistic `largest`."""
        ...

    def rounded(self, inputs: torch.Tensor, activation_scale: torch.Tensor) -> torch.Tensor:
        """The inputs [tokens, in] that a product with the decoded weight would need for what the kernel computes."""
        ...


@runtime_checkable
class CodesAnother(Protocol):
    """A codec whose codes do not stand for one element of the weight each, but of another one: a rotated weight."""

    def plain(self, weight: torch.Tensor, encoded: Encoded) -> tuple[Codec, torch.Tensor, Encoded]:
        """That other weight [out, in], the codec that it is coded with, and its fields."""
        ...


class Measured(ABC):
    """Base of the codecs whose kernels do not measure what they lose while they encode."""

    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> Encoded:
        """A codec's own."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """A codec's own."""

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """Encodes, decodes, and compares."""
        encoded = self.encode(weight)
        return encoded, squares(weight, self.decode(encoded))


class DataFree(Measured):
    """Base of the codecs that look at the weight alone."""

    decodes_to = "BF16"
    rate = 0.0

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """Nothing is."""
        return None


def of_text(codec: Codec) -> tuple[str, ...]:
    """What of its `needs` only a text can say."""
    return tuple(name for name in codec.needs if name != LARGEST_WEIGHT)


def name_of(codec: Codec) -> str:
    """The name by which a recipe asks for it."""
    return plugins.name_of_module(type(codec).__module__, sys.modules[__name__])


def make(name: str, options: dict[str, Any]) -> Codec:
    """The codec `name` with the options of a recipe rule. Raises PlanError."""
    package = sys.modules[__name__]
    if name not in plugins.names(package):
        raise PlanError(f"there is no codec {name!r}; there are {', '.join(plugins.names(package))}", [])
    cls = plugins.load(package, name).CODEC
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(options) - known):
        takes = f"takes {', '.join(sorted(known))}" if known else "takes no options"
        raise PlanError(f"codec {name} has no option {', '.join(unknown)}; it {takes}", [])
    try:
        codec: Codec = cls(**options)
    except (ValueError, TypeError) as error:
        raise PlanError(f"codec {name}: {error}", []) from None
    return codec
