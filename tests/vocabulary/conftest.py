"""What the modules here share: a tokenizer as ERNIE's is, and lines of text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.vocabularies import lines, sentencepiece_model

ROWS = 2100  # of the embedding; the tokenizer has 2000 pieces


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return lines("english", "chinese", "code", "chinese_mathematics")


@pytest.fixture(scope="session")
def ernie(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A folder with tokenizer.model alone."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("ernie")
    sentencepiece_model(folder, texts)
    return folder


@pytest.fixture
def another(ernie: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`another("x")`: a copy of that folder, to be changed."""

    def copy(name: str = "model") -> Path:
        return Path(shutil.copytree(ernie, tmp_path / name))

    return copy
