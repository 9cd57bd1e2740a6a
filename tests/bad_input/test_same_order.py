"""The same bad folder, the same lines: in whatever order a process happens to keep its sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.disk import no_waiting
from helpers.models import write
from helpers.synthetic import tiny, wide, write_index, write_model, write_ranks, write_safetensors

from ernie_quant.checkpoint import Stamp
from ernie_quant.errors import CheckpointError
from ernie_quant.planning.built_in import fastdeploy_container
from ernie_quant.sources import open_source
from ernie_quant.views.files import Files

SEEDS = ("1", "2", "3")
RULES = "".join(f"[[rule]]\nnames = {[f'{a}{b}{c}' for c in 'xyz']}\ncodec = 'rtn'\n{b} = 1\n" for a in "pq" for b in "mn")


def many_problems() -> dict[str, torch.Tensor]:
    """Tensors that are unknown, and of a wrong shape; every fifth that should be there is not."""
    tensors = tiny()[1]
    for number, name in enumerate(list(tensors)):
        if number % 5 == 0:
            del tensors[name]
        elif number % 5 == 1:
            tensors[name] = torch.zeros(3, 5)
    return tensors | {f"model.layers.{i}.{x}.weight": torch.zeros(2) for i in (2, 10, 1) for x in ("ghost", "spook", "phantom")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, ranks and a container, each with many mistakes, and a recipe with some."""
    folder = tmp_path_factory.mktemp("order")
    write_model(folder / "src", tiny()[0], many_problems(), shards=4)
    index = json.loads((folder / "src/model.safetensors.index.json").read_text())["weight_map"]
    moved = {name: file.replace("00001", "00002") for name, file in index.items()}
    write_index(folder / "src", {f"{name}x" if i % 7 == 0 else name: file for i, (name, file) in enumerate(moved.items())})
    for name in ("b.gguf", "a.onnx", "c.pt"):
        (folder / "src" / name).write_bytes(b"")

    write_ranks(folder / "ranks", "moe", 2)
    write_safetensors(folder / "ranks/rank1/model.safetensors", {f"ernie.{x}": torch.zeros(1) for x in "cab"}, {}, "U16")

    write_model(folder / "plain", *wide())
    with no_waiting():
        write(folder / "plain", folder / "container", "fastdeploy", recipe=fastdeploy_container("wint2", 0, effort=1))
    stored = {f"ernie.layers.{i}.{x}.quant_weight": torch.zeros(1) for i in (3, 12, 1) for x in ("ghost", "spook")}
    write_safetensors(folder / "container/model.safetensors", stored, {"format": "np"}, "U16")
    (folder / "rules.toml").write_text(RULES)
    return folder


def said(folder: Path, seed: str, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONHASHSEED": seed}
    line = [sys.executable, "-m", "ernie_quant", *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (("inspect", "src"), 40),
        (("inspect", "src", "--json"), 40),
        (("plan", "src"), 40),
        (("convert", "src", "out", "--to", "paddle"), 40),
        (("wint4", "src", "out"), 40),
        (("inspect", "ranks"), 40),
        (("convert", "ranks", "out", "--to", "pt"), 40),
        (("dequantize", "container", "out", "--to", "pt"), 20),
        (("reshard", "container", "out", "--tp", "1"), 20),
        (("quantize", "plain", "out", "--recipe", "rules.toml"), 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_process_says_the_same_lines_in_the_same_order(arguments: tuple[str, ...], lines: int, folder: Path) -> None:
    code, text = said(folder, SEEDS[0], *arguments)
    assert (code, len(text.splitlines()) > lines) == (1, True), text
    for seed in SEEDS[1:]:
        assert said(folder, seed, *arguments) == (code, text)


def test_of_several_files_that_have_changed_the_first_is_named(folder: Path) -> None:
    stamps = {file: Stamp(1, 1) for rank in open_source(folder / "src").ranks for file in rank.files}
    assert len(stamps) == 3  # the index names no others
    files = Files(stamps)
    files._read.update(reversed(stamps))  # and changed since
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors: has changed since the run began"):
        files.check()
