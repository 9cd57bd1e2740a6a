"""Small models with a tokenizer, and what was measured of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import GOLDEN, random_model
from helpers.words import byte_tokenizer
from safetensors.torch import load_file, save_file

from ernie_quant.weights import layouts


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden MoE, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("allocation") / "source"
    shutil.copytree(GOLDEN / "moe_hf/pt", folder)
    return byte_tokenizer(folder)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that FastDeploy's and GGUF's blocks divide; three layers, two of them with experts."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("allocation") / "wide"
    random_model(
        folder,
        layouts.PT,
        "moe",
        hidden_size=256,
        head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=256,
        moe_num_experts=4,
    )
    return byte_tokenizer(louder(folder))


def louder(folder: Path, times: float = 6.0) -> Path:
    """Larger weights: small random ones make the same logits of all tokens, and no error is seen in them."""
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        linears = ("_proj.weight", "lm_head.weight", "embed_tokens.weight")
        save_file({name: tensor * times if name.endswith(linears) else tensor for name, tensor in found.items()}, file)
    return folder


@pytest.fixture(scope="session")
def book(model: Path) -> Path:
    """A text of more than 2000 tokens."""
    file = model.with_name("book.txt")
    file.write_text("".join(f"{n} is {'odd' if n % 2 else 'even'} and {n * n}.\n" for n in range(200)))
    return file
