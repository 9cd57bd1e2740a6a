"""Files that lie, and that they are read or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie_quant.errors import CheckpointError
from helpers.synthetic import read_file, write_bin, write_pdparams, write_safetensors

BF16 = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.125]], dtype=torch.bfloat16)
FORMATS = {"safetensors": write_safetensors, "pdparams": write_pdparams, "bin": write_bin}


def refusal(path: Path) -> str:
    """The one line that reading `path` is refused with."""
    with pytest.raises(CheckpointError) as error:
        read_file(path)
    line = str(error.value)
    assert line.startswith(path.name)
    assert "\n" not in line
    assert len(line) < 1000
    return line


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/ernie-quant-was-here",)


def reads_or_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        tensors = read_file(path)
    except CheckpointError as error:
        line = str(error)
        assert line.startswith(path.name)
        assert line.isprintable()
    else:
        assert sum(t.nbytes for t in tensors.values()) <= 10 * len(data)
