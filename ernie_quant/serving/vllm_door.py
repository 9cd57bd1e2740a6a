"""What vLLM is given in every process: a name, and a class that fetches the rest when a checkpoint of ours comes.

vLLM asks every class in the list whether a checkpoint is its own, of other models too; so this one imports no more than
vLLM's list does (model_executor/layers/quantization/__init__.py; config/model.py, _verify_quantization).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

METHOD = "ernie-wint2"  # runtimes/_wint2.METHOD, which would bring codecs along


class Door(QuantizationConfig):  # type: ignore[misc]
    """Never made; its one method makes a `vllm_config.Wint2Config`."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Of quantization_config in config.json. Raises NeedsError in a vLLM that is not known, ConfigError."""
        from vllm.version import __version__

        from ernie_quant.serving.vllm_versions import refuse_unknown

        refuse_unknown(__version__)
        from ernie_quant.serving.vllm_config import Wint2Config

        return Wint2Config.from_config(config)

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None: config.json says it all."""
        return []


def open_once() -> None:
    """Register it, if that was not done in this process."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(Door)
