"""A small model with a tokenizer, what was made of it, and a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.disk import no_waiting
from helpers.models import GOLDEN, write
from helpers.words import byte_tokenizer

from ernie_quant.planning import built_in


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden MoE, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("calibration") / "source"
    shutil.copytree(GOLDEN / "moe_hf/pt", folder)
    return byte_tokenizer(folder)


@pytest.fixture(scope="session")
def quantized(model: Path) -> Path:
    """Its experts in 4 bits."""
    recipe = built_in.make("wint4", "vllm", group_size=32, experts_only=True).recipe
    with no_waiting():
        write(model, model.with_name("wint4"), recipe=recipe)
    return model.with_name("wint4")


@pytest.fixture(scope="session")
def book(model: Path) -> Path:
    """A text of more than 2000 tokens."""
    file = model.with_name("book.txt")
    file.write_text("".join(f"{n} is {'odd' if n % 2 else 'even'} and {n * n}.\n" for n in range(200)))
    return file
