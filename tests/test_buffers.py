"""Memory of slabs is used again, never while anybody has it; weights are worked on some rows at a time."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from helpers.models import invoke, random_model
from helpers.runs import OF_128S

from ernie_quant.codecs import Codec
from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.fp8 import Float8Block
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.measure import Difference
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


@pytest.mark.parametrize("codec", [RoundToNearest(4, 32), Float8Block(), ConvolutionalCode(effort=1)], ids=lambda c: c.describe())
def test_sums_of_blocks_are_those_of_the_whole_but_for_the_last_digits(
    codec: Codec,
) -> None:
    """On a GPU a slab is one block: by so much may its report differ from that of a CPU."""
    weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(1)).pow(3).bfloat16()
    found = []
    for rows in (128, 1024):
        parts = [codec.measured(block)[1] for block in weight.split(rows)]
        found.append(sum(parts, Difference()))
    assert found[0].largest == found[1].largest
    assert found[0].error == pytest.approx(found[1].error, rel=1e-14, abs=0)
    assert found[0].total == pytest.approx(found[1].total, rel=1e-14, abs=0)
