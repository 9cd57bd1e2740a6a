"""Runtimes, one file each: the bytes and names that a program wants to load.

CODECS                                  classes of codecs that it can store
LAYOUT                                  layout of names and weights: pt or paddle
ROWS                                    rows of a weight whose bytes it mixes: slabs are multiples of it
CONFIG                                  entries of config.json beside quantization_config
folder(role)                            subfolder of the result for the tensors of a role
unsupported(linears)                    what it can write, but no program loads
parts(name, codec, spec)                stored tensors of a weight: {name: TensorSpec}
constants(name, codec, spec)            those of them that do not depend on the weight's values
pack(name, codec, encoded)              the others, for a weight or a slab of its rows
unpack(name, codec, parts)              encoded fields again, from stored tensors
weight_of(name)                         (weight, part) that a stored tensor belongs to
layer_of(name, role)                    the layer in memory that a linear is a part of: one form for all of it
problems(linears)                       what of a plan the program would not load
quantization_config(linears)            what config.json says of it; None for nothing quantized
codecs_of(config, linears)              what config.json promises for each linear: the way back
tp_sizes(linears, dims)                 tensor-parallel sizes that it can be loaded with
commands(out, config, tp)               [(title, shell command)] that run the result
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

from ernie_quant import plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.errors import PlanError


@dataclass(frozen=True)
class Linear:
    """A weight matrix as runtimes see it: PT name, [out, in], role, and how it is stored."""

    name: str
    spec: TensorSpec
    role: str
    codec: Codec

    @property
    def module(self) -> str:
        """Name of the layer."""
        return self.name.removesuffix(".weight")


def find(name: str) -> ModuleType:
    """The runtime of that name. Raises PlanError."""
    package = sys.modules[__name__]
    if name not in plugins.names(package):
        raise PlanError(f"there is no runtime {name!r}; there are {', '.join(plugins.names(package))}", [])
    return plugins.load(package, name)
