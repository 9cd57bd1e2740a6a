"""Finished results, and how to damage one: bytes, JSON files, and a manifest that says it was always so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie_quant.check.verify import verify
from ernie_quant.errors import VerifyError
from ernie_quant.readers.safetensors import read_header
from ernie_quant.result.manifest import sums
from helpers.models import tensors

EXPERT = "model.layers.1.mlp.experts.3.down_proj"

# widths that blocks of 128 divide; heads stay 4 and 2, in vl 2 and 1
WIDTHS: dict[str, dict[str, Any]] = {
    "dense": {"hidden_size": 128, "head_dim": 64, "intermediate_size": 384, "num_hidden_layers": 2},
    "moe": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 3},
    "moe_mtp": {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "moe_num_experts": 2},
    "vl": {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": [256, 128]},
}


def sealed(folder: Path) -> Path:
    """The manifest tells the truth about the bytes again, as a careful forger would have it."""
    file = folder / "ernie-quant.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    file.write_text(json.dumps(manifest))
    (folder / "SHA256SUMS").write_text(sums(manifest["files"], file.read_bytes()))
    return folder


def refused(folder: Path, against: Path | None = None) -> list[str]:
    with pytest.raises(VerifyError) as error:
        verify(folder, against)
    return error.value.problems


def poke(folder: Path, name: str, data: bytes) -> None:
    """Overwrite the first bytes of a stored tensor."""
    file = folder / "model.safetensors"
    ref = next(r for r in read_header(file) if r.name == name)
    with open(file, "r+b") as opened:
        opened.seek(ref.extents[0].start)
        opened.write(data)


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a JSON file, and the manifest with it."""
    table = json.loads((folder / file).read_text())
    change(table)
    (folder / file).write_text(json.dumps(table))
    return sealed(folder)


def first_byte(folder: Path, name: str) -> int:
    return int(tensors(folder)[name].view(-1).view(torch.uint8)[0])
