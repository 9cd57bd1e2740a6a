"""Architectures, one file each: a name table, its dimensions from config.json, and config.json in every spelling."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, Protocol, cast

from ernie_quant import plugins
from ernie_quant.archs._config import Facts
from ernie_quant.errors import ConfigError
from ernie_quant.names import NameMap


class Arch(Protocol):
    """What the file of an architecture has."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """Values of model_type in config.json that it answers for."""
        ...

    def flat(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json as the other functions want it, whatever spelling it came in. Raises ConfigError."""
        ...

    def name_map(self, config: dict[str, Any], names: Collection[str]) -> NameMap:
        """The table for a flat config; `names` are those of the stored tensors. Raises ConfigError."""
        ...

    def config_for(self, layout: str, config: dict[str, Any], facts: Facts) -> dict[str, Any]:
        """config.json in the words of a layout."""
        ...


def find(config: dict[str, Any]) -> Arch:
    """The architecture that answers for config.json's model_type. Raises ConfigError."""
    archs = [cast(Arch, module) for module in plugins.modules(sys.modules[__name__])]
    known = {model_type: arch for arch in archs for model_type in arch.MODEL_TYPES}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"config.json: model_type is {model_type!r}; supported are {', '.join(sorted(known))}")
    return known[model_type]
