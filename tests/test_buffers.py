"""Memory of slabs is used again, never while anybody has it; weights are worked on some rows at a time."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from helpers.models import invoke, random_model
from helpers.runs import OF_128S

from ernie_quant.run import shard
from ernie_quant.views.buffers import LEAST, Buffers
from ernie_quant.weights.layouts import PT

SHAPE = (2, LEAST)


def test_memory_that_nobody_has_is_taken_again() -> None:
    buffers = Buffers()
    first = buffers.empty(SHAPE, torch.bfloat16)
    where = first.data_ptr()
    assert (tuple(first.shape), first.dtype, first.is_contiguous()) == (SHAPE, torch.bfloat16, True)
    del first
    assert buffers.empty((SHAPE[1],), torch.uint8).data_ptr() == where  # a smaller one


@pytest.mark.parametrize("keep", [lambda t: t, lambda t: t[1:, 5:7], lambda t: t.view(torch.uint8).numpy(), lambda t: t.t()])
def test_a_view_keeps_it(keep) -> None:
    buffers = Buffers()
    tensor = buffers.empty(SHAPE, torch.float32)
    tensor.fill_(3)
    where, kept = tensor.data_ptr(), keep(tensor)
    del tensor
    gc.collect()
    other = buffers.empty(SHAPE, torch.float32)
    assert other.data_ptr() != where
    other.fill_(4)
    assert torch.as_tensor(kept).view(torch.float32).eq(3).all()


def test_a_larger_one_gets_memory_of_its_own() -> None:
    buffers = Buffers()
    buffers.empty(SHAPE, torch.uint8)
    assert buffers.empty((4, LEAST), torch.float32).shape == (4, LEAST)


@pytest.mark.parametrize("shape", [(), (0, 5), (3, 0), (7,)])
def test_small_and_empty_ones(shape: tuple[int, ...]) -> None:
    assert Buffers().empty(shape, torch.int32).shape == shape


@pytest.mark.parametrize(
    "command", [("wint4", "--experts-only"), ("wint4", "--runtime", "fastdeploy"), ("fp8",), ("wint2", "--wint4-layers", "0")]
)
def test_how_many_rows_are_worked_on_at_a_time_changes_no_byte(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_model(tmp_path / "src", PT, **OF_128S)
    files = []
    for at_once in (1, 20_000, 1 << 40):
        monkeypatch.setattr(shard, "AT_ONCE", at_once)
        out = tmp_path / str(at_once)
        invoke(command[0], source, out, *command[1:])
        files.append({path.name: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))})
    assert files[0] == files[1] == files[2]
    assert files[0]
