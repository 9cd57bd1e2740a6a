"""What most runtimes answer alike."""

from __future__ import annotations

from collections.abc import Collection

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.runtimes import About


def model_problems(about: About) -> list[str]:
    """It takes every ERNIE."""
    return []


def stem(about: About) -> str:
    """As everywhere."""
    return "model"


def fallback(codec: Codec, spec: TensorSpec) -> Codec | None:
    """Such a weight is kept."""
    return None


def suited(codec: Codec, roles: Collection[str]) -> Codec:
    """The codec as it is."""
    return codec


def one_scale(name: str) -> str:
    """Every weight has its own."""
    return name
