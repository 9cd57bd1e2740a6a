"""Runtimes, one file each: the bytes and names that a program wants to load. A file has what `Runtime` lists."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ernie_quant import plugins
from ernie_quant.checkpoint import Checkpoint, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.names import NameMap

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


@dataclass(frozen=True)
class Part:
    """What a weight [out, in] has of one stored tensor, and along which of its axes it grows with the weight's.

    Where inputs are shared among ranks, `interleave` rows of the tensor take turns along `in_axis` and are cut together.
    With an `index` the stored tensor is a stack of several weights' parts, one after the other along a new first axis, and
    this is the one of that number.
    """

    spec: TensorSpec
    out_axis: int | None = 0
    in_axis: int | None = None
    interleave: int = 1
    index: int | None = None

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


class Runtime(Protocol):
    """What the file of a runtime has."""

    @property
    def CODECS(self) -> tuple[type, ...]:
        """Classes of codecs that it can store."""
        ...

    @property
    def LAYOUT(self) -> str:
        """Name of the layout of names and weights, of `weights.layouts`."""
        ...

    @property
    def FORMAT(self) -> str:
        """Name of the file format, of `writers`."""
        ...

    @property
    def ROWS(self) -> int:
        """Rows of a weight whose bytes it mixes: slabs are multiples of it."""
        ...

    @property
    def CONFIG(self) -> Mapping[str, Any]:
        """Entries of config.json beside quantization_config."""
        ...

    @property
    def RECIPES(self) -> tuple[str, ...]:
        """Built-in recipes that it can store: names of `plan.built_in`."""
        ...

    @property
    def PER_RANK(self) -> bool:
        """Are its quantized checkpoints stored per tensor-parallel rank, in one container of fixed forms?"""
        ...

    @property
    def SPLITS_VOCABULARY(self) -> bool:
        """Do ranks share the vocabulary without padding it?"""
        ...

    @property
    def QUANTIZES_VOCABULARY(self) -> bool:
        """Can a recipe give the embeddings and the head a codec?"""
        ...

    @property
    def BY_LAYERS(self) -> bool:
        """Do several GPUs get whole layers, and no shares of each?"""
        ...

    @property
    def CASTS(self) -> bool:
        """May a kept weight have any plain dtype?"""
        ...

    def kept_as(self, role: str, spec: TensorSpec, *, quantized: bool) -> str:
        """The dtype in which it wants a kept weight, in a result that has `quantized` ones or not."""
        ...

    def folder(self, role: str) -> str:
        """Subfolder of the result for the tensors of a role."""
        ...

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Is this quantization_config of its files?"""
        ...

    def metadata(self, about: About) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What weight files say of themselves and the model, in the words of their format; and notes.

        Raises ConfigError or CheckpointError.
        """
        ...

    def model_problems(self, about: About) -> list[str]:
        """What of the model the program would compute otherwise, however its weights are stored."""
        ...

    def stem(self, about: About) -> str:
        """How the names of weight files begin."""
        ...

    def fallback(self, codec: Codec, spec: TensorSpec) -> Codec | None:
        """What stands in for a codec that does not take a weight; None if such a weight is kept."""
        ...

    def parts(self, name: str, codec: Codec, spec: TensorSpec) -> dict[str, Part]:
        """Stored tensors of a weight [out, in], in the order in which they are written."""
        ...

    def constants(self, name: str, codec: Codec, spec: TensorSpec, once: Encoded) -> dict[str, torch.Tensor]:
        """Those of them that are stored once per weight; `once`: the fields that the codec prepared once."""
        ...

    def pack(self, name: str, codec: Codec, encoded: Encoded) -> dict[str, torch.Tensor]:
        """The others, for a weight or a slab of its rows."""
        ...

    def unpack(self, name: str, codec: Codec, stored: Mapping[str, torch.Tensor]) -> Encoded:
        """What was encoded, from stored tensors."""
        ...

    def weight_of(self, name: str) -> tuple[str, str]:
        """(weight, part) that a stored tensor belongs to."""
        ...

    def layer_of(self, name: str, role: str) -> str:
        """The layer in memory that a linear is a part of: all of it is stored alike."""
        ...

    def suited(self, codec: Codec, roles: Collection[str]) -> Codec:
        """The codec as a model that has these roles wants it: the same values, which other tensors may hold."""
        ...

    def problems(self, linears: Sequence[Linear]) -> list[str]:
        """What of a plan the program would not load."""
        ...

    def unsupported(self, linears: Sequence[Linear]) -> list[str]:
        """What it can write, but no program loads."""
        ...

    def notes(self, linears: Sequence[Linear]) -> list[str]:
        """What a user should know before it is loaded."""
        ...

    def quantization_config(self, linears: Sequence[Linear]) -> dict[str, Any] | None:
        """What config.json says of it; None for nothing quantized."""
        ...

    def codecs_of(self, config: Mapping[str, Any], linears: Sequence[tuple[str, TensorSpec]]) -> dict[str, Codec]:
        """What config.json promises for each linear: the way back. Raises ConfigError."""
        ...

    def misread(self, config: Mapping[str, Any], linears: Sequence[Linear]) -> list[str]:
        """Where config.json says something else of a linear than it is, by any name that a program has for it."""
        ...

    def share_multiple(self, linear: Linear) -> int:
        """A rank's share of the linear, along the axis that ranks share, must be a multiple of it; 0 where heads decide."""
        ...

    def commands(self, out: Path, config: Mapping[str, Any], tp: Sequence[int]) -> list[tuple[str, str]]:
        """(title, shell command) that run the result."""
        ...


def find(name: str) -> Runtime:
    """The runtime of that name. Raises PlanError."""
    package = sys.modules[__name__]
    if name not in plugins.names(package):
        raise PlanError(f"there is no runtime {name!r}; there are {', '.join(plugins.names(package))}", [])
    return cast(Runtime, plugins.load(package, name))


def storing(recipe: str) -> tuple[str, ...]:
    """Names of the runtimes that can store a built-in recipe."""
    package = sys.modules[__name__]
    return tuple(name for name in plugins.names(package) if recipe in find(name).RECIPES)


def recognize(config: Mapping[str, Any]) -> Runtime:
    """The runtime whose files have this quantization_config. Raises ConfigError."""
    package = sys.modules[__name__]
    for name in plugins.names(package):
        if (runtime := find(name)).recognizes(config):
            return runtime
    raise ConfigError(f"config.json: quant_method {config.get('quant_method')!r} is none that this tool writes")
