"""Golden checkpoints with other settings or other tensors, and what the name table makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie_quant.errors import PlanError
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.weights.plain import Resolved, resolve
from helpers.models import tensors, write
from helpers.paths import GOLDEN

Tensors = dict[str, torch.Tensor]


def golden(family: str, layout: str = "pt", **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """config.json (with `changes`; None removes a key) and tensors of a golden checkpoint."""
    config = json.loads((GOLDEN / family / layout / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    return config, tensors(GOLDEN / family / layout)


def model(folder: Path, config: Mapping[str, Any], table: Tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in table.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def resolved(folder: Path) -> Resolved:
    return resolve(open_source(folder))


def written(folder: Path, out: Path, runtime: str = "vllm") -> dict[str, Any]:
    """config.json of the conversion."""
    write(folder, out, runtime)
    return json.loads((out / "config.json").read_text())


def problems(tmp_path: Path, config: Mapping[str, Any], table: Tensors) -> list[str]:
    """Lines of the refusal, which are those of `inspect` too."""
    folder = model(tmp_path / "bad", config, table)
    with pytest.raises(PlanError) as refused:
        make_plan(open_source(folder), runtime="vllm")
    assert refused.value.problems == resolved(folder).problems
    return refused.value.problems
