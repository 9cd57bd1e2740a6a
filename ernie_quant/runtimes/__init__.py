"""Runtimes, one file each: the bytes and names that a program wants to load. A file has what `Runtime` lists."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from ernie_quant import plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.runtimes._values import About as About
from ernie_quant.runtimes._values import Linear as Linear
from ernie_quant.runtimes._values import Part as Part
from ernie_quant.runtimes._values import Place as Place
from ernie_quant.runtimes._values import Spread as Spread
from ernie_quant.runtimes._values import kept as kept

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded


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
    def MORE_BITS_FIRST(self) -> bool:
        """Must a layer's experts have no more bits than those of the layer before it?"""
        ...

    def candidates(self, role: str) -> tuple[Codec, ...]:
        """Codecs that `allocate` chooses among for linears of a role, the fewest bits first; one where it has no choice."""
        ...

    def alike(self, name: str, role: str) -> str:
        """What has one codec: a name that all its weights share."""
        ...

    @property
    def PARALLEL(self) -> Collection[str]:
        """How several GPUs can share a model: of TENSOR, EXPERTS and STAGES."""
        ...

    @property
    def AT_LOAD(self) -> Mapping[str, str]:
        """Built-in recipes that it makes itself of a plain checkpoint when it loads one, and its option for that."""
        ...

    @property
    def VERSION(self) -> int:
        """Raised whenever it stores the same codes in other bytes, names or words of config.json."""
        ...

    @property
    def PROGRAM(self) -> str:
        """What people call it."""
        ...

    def library(self, config: Mapping[str, Any]) -> str:
        """What hubs call the library that loads files of this config.json."""
        ...

    @property
    def TAGS(self) -> tuple[str, ...]:
        """By which hubs find programs that load them."""
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

    def one_scale(self, name: str) -> str:
        """What has one scale, where a codec gives a whole weight one: a name that the weights of the layer share."""
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

    def commands(self, place: Place, config: Mapping[str, Any], spread: Spread) -> list[tuple[str, str]]:
        """(title, shell command) that run the result on GPUs that share it so."""
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
