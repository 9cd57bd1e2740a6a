"""Checkpoints that transformers does not load by itself, each with the plain one that `dequantize` makes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.disk import no_waiting
from helpers.in_transformers import CASES, Pair
from helpers.models import invoke, random_model, write
from helpers.results import WIDTHS

from ernie_quant.planning import recipe
from ernie_quant.weights import layouts


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of a family."""
    root = tmp_path_factory.mktemp("serving")
    more: dict[str, dict[str, Any]] = {
        "moe": {"tie_word_embeddings": False, "moe_intermediate_size": 256}, "moe_mtp": {"moe_num_experts": 4}, "vl": {},
    }  # fmt: skip

    @cache
    def source(family: str) -> Path:
        return random_model(root / family, layouts.PT, family, **WIDTHS[family] | more[family])

    return source


@pytest.fixture(scope="session")
def pairs(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The checkpoints of a case."""
    root = tmp_path_factory.mktemp("pairs")

    @cache
    def pair(case: str) -> Pair:
        family, rules = CASES[case]
        out, plain = (root / f"{list(CASES).index(case)}{kind}" for kind in ("", "-plain"))
        spelling = {"vl_config": "transformers"} if family == "vl" else {}
        asked = recipe.Recipe("test", tuple(recipe.RecipeRule(codec, match=match) for match, codec in rules))
        with no_waiting():
            write(sources(family), out, recipe=asked, **spelling)
            invoke("dequantize", out, plain, "--to", "pt", "-q", *(("--vl-config", "transformers") if spelling else ()))
        return Pair(out, plain, sources(family))

    return pair


TABLES = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING", "LOADING_ATTRIBUTES_CONFIG_TYPES")


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`import ernie_quant.transformers`, for this test alone."""
    from transformers.quantizers import auto

    for table in TABLES:
        monkeypatch.setattr(auto, table, copy.copy(getattr(auto, table)))
    import ernie_quant.transformers

    ernie_quant.transformers.register()
    return ernie_quant.transformers
