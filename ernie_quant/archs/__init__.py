"""Architectures, one file each: a name table, its dimensions from config.json, and config.json in every spelling.

MODEL_TYPES                        values of model_type in config.json that the file answers for
flat(config)                       config.json as the other functions want it, whatever spelling it came in
name_map(config, names)            NameMap for a flat config; `names` are those of the stored tensors
config_for(layout, config, facts)  config.json in the words of a layout
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from ernie_quant import plugins
from ernie_quant.errors import ConfigError


def find(config: dict[str, Any]) -> ModuleType:
    """The architecture that answers for config.json's model_type. Raises ConfigError."""
    known = {t: module for module in plugins.modules(sys.modules[__name__]) for t in module.MODEL_TYPES}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"config.json: model_type is {model_type!r}; supported are {', '.join(sorted(known))}")
    return known[model_type]
