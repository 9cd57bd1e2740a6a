"""What runtimes are asked about and what they answer: linears, stored parts, and how GPUs share a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_quant.checkpoint import Checkpoint, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.names import NameMap

# ways in which several GPUs share a model: each layer, the experts whole, and layers one after the other
TENSOR, EXPERTS, STAGES = "tensor", "experts", "stages"


@dataclass(frozen=True)
class Part:
    """What a weight [out, in] has of one stored tensor, and along which of its axes it grows with the weight's.

    Where inputs are shared among ranks, `interleave` rows of the tensor take turns along `in_axis` and are cut together.
    With an `index` the stored tensor is a stack of several weights' parts, one after the other along a new first axis, and
    this is the one of that number. What is stored once has a number for each of some `outputs`, if it names any: symbols of
    dimensions, one after the other along the first axis, which ranks share as they share these.
    """

    spec: TensorSpec
    out_axis: int | None = 0
    in_axis: int | None = None
    interleave: int = 1
    index: int | None = None
    outputs: tuple[str, ...] = ()

    def span(self, rows: tuple[int, int], out: int) -> tuple[int, int]:
        """Where rows of a weight of `out` rows lie along `out_axis`."""
        assert self.out_axis is not None
        size = self.spec.shape[self.out_axis]
        return rows[0] * size // out, -(-rows[1] * size // out)


def kept(spec: TensorSpec) -> Part:
    """The weight as it is."""
    dims = len(spec.shape)
    return Part(spec, 0 if dims else None, 1 if dims > 1 else None)


@dataclass(frozen=True)
class Linear:
    """A weight matrix as runtimes see it: its name, [out, in], role, how it is stored, and which axis ranks share."""

    name: str
    spec: TensorSpec
    role: str
    codec: Codec
    ranks: int | None

    @property
    def module(self) -> str:
        """Name of the layer."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class About:
    """What is written: the source, its flat config and table, the recipe's name, codecs and elements of the weights."""

    source: Checkpoint
    config: Mapping[str, Any]
    table: NameMap
    recipe: str
    codecs: Sequence[tuple[Codec, int]]


@dataclass(frozen=True)
class Spread:
    """How GPUs share a model: `tensor` of them each layer, in `stages` that have some of the layers each.

    With `experts_whole` those of a stage share the experts one by one, and all else as before.
    """

    tensor: int = 1
    stages: int = 1
    experts_whole: bool = False

    @property
    def gpus(self) -> int:
        """How many."""
        return self.tensor * self.stages

    def describe(self) -> str:
        """`TP 4`, `TP 8, EP`, `TP 4, PP 3`: in the words of the programs."""
        words = [f"TP {self.tensor}"] if self.tensor > 1 else []
        words += ["EP"] if self.experts_whole else []
        words += [f"PP {self.stages}"] if self.stages > 1 else []
        return ", ".join(words) or "one GPU"


@dataclass(frozen=True)
class Place:
    """Where a result is: the name that commands call it by, and the hub it is on; none for a folder of this machine."""

    name: str
    hub: str = ""

    @property
    def local(self) -> str:
        """The folder that it is in, or is downloaded to."""
        return self.name.rpartition("/")[2] if self.hub else self.name
