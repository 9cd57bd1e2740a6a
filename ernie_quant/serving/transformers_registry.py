"""Puts our quantizers into transformers' tables (quantizers/auto.py)."""

from __future__ import annotations

import warnings
from typing import Any

from transformers.quantizers import auto

from ernie_quant.codecs.fp8 import COMPRESSED_TENSORS
from ernie_quant.runtimes._wint2 import METHOD
from ernie_quant.serving.transformers_quantizer import CompressedTensors, Wint2, Wint2Config


def register() -> None:
    """Once or several times."""
    tables: Any = auto
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Wint2Config
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = Wint2
    tables.AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = CompressedTensors
    if Wint2Config not in tables.LOADING_ATTRIBUTES_CONFIG_TYPES:  # those of which it takes what from_pretrained is given
        tables.LOADING_ATTRIBUTES_CONFIG_TYPES += (Wint2Config,)
    # it warns that `native` is taken from there, which is what was asked for
    warnings.filterwarnings("ignore", r"(?s)You passed `quantization_config`.*loading attributes \(e\.g\. \['native'\]\)")
