"""A result of int4 experts to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import copy, write
from helpers.runs import SOURCE, everything

from ernie_quant.codecs.rtn import RoundToNearest


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden MoE with int4 experts in groups of 32."""
    out = tmp_path_factory.mktemp("verify") / "int4"
    write(SOURCE, out, recipe=everything(RoundToNearest(4, 32), experts_only=True))
    return out


@pytest.fixture
def out(template: Path, tmp_path: Path) -> Path:
    return copy(template, tmp_path / "out")
