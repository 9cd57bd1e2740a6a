"""Every test here runs in Triton's interpreter, and, marked `gpu`, on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.gpu import interpret


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tensors of a test lie that kernels for GPUs work on."""
    pytest.importorskip("triton", reason="Triton is not installed; there is none for this system")
    interpreted = os.environ["TRITON_INTERPRET"] == "1"
    if request.param == "cuda":
        assert torch.cuda.is_available(), "a test that is marked gpu, and PyTorch finds no GPU"
        assert not interpreted, "TRITON_INTERPRET=0 is needed: Triton would interpret its kernels"
        return "cuda"
    if not interpreted:
        pytest.skip("TRITON_INTERPRET is not 1")
    interpret(monkeypatch)
    return "cpu"
