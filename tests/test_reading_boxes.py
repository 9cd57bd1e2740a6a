"""Cuts of stored tensors with three and four dimensions, along every axis: the same as numpy, in as few reads as can be."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import quick
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ernie_quant.readers import read_header
from ernie_quant.views import build
from ernie_quant.views import read as views_read
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View

Array = np.ndarray[Any, Any]
SHAPES = [(4, 3, 5), (2, 6, 3), (1, 5, 4), (6, 1, 2), (3, 4, 2, 5), (5, 2, 4, 3), (2, 1, 3, 7)]
DTYPES = [torch.int16, torch.float32, torch.uint8]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[View, Array]]:
    """A file of the safetensors library; every element of a tensor is another number (none has more than 120)."""
    tensors = {
        f"{shape} {dtype}": torch.arange(math.prod(shape)).add(number).to(dtype).reshape(shape)
        for number, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }
    path = tmp_path_factory.mktemp("boxes") / "model.safetensors"
    save_file(tensors, path)
    return [(build.leaf(ref), tensors[ref.name].numpy()) for ref in read_header(path)]


def read(view: View, rows: tuple[int, int] | None = None) -> Array:
    with Files() as files:
        tensor = views_read.read(view, files, rows)
    assert tensor.is_contiguous()
    return tensor.numpy()


@pytest.fixture
def cube(tmp_path: Path) -> View:
    """0 … 23 as [2, 3, 4], int32."""
    save_file({"cube": torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)}, tmp_path / "m.safetensors")
    (ref,) = read_header(tmp_path / "m.safetensors")
    return build.leaf(ref)


def test_cuts_of_a_cube_by_hand(cube: View) -> None:
    assert read(build.cut(cube, 0, 1, 2)).tolist() == [[[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]]
    assert read(build.cut(cube, 1, 1, 2)).tolist() == [[[4, 5, 6, 7]], [[16, 17, 18, 19]]]
    assert read(build.cut(cube, 2, 2, 4)).tolist() == [[[2, 3], [6, 7], [10, 11]], [[14, 15], [18, 19], [22, 23]]]
    corner = build.cut(build.cut(cube, 2, 3, 4), 1, 1, 3)
    assert read(corner).tolist() == [[[7], [11]], [[19], [23]]]
    assert read(corner, (1, 2)).tolist() == [[[19], [23]]]


@pytest.mark.parametrize(
    ("axis", "cut", "expected"),
    [
        (0, (1, 2), [48]),  # half of the cube
        (1, (1, 3), [32, 32]),  # two of three rows of 16 bytes, in each half
        (2, (1, 2), [4] * 6),  # one number of each row
        (2, (0, 4), [96]),
    ],
)
def test_what_lies_together_is_read_at_once_and_nothing_else(
    axis: int, cut: tuple[int, int], expected: list[int], cube: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of each read."""
    found: list[int] = []
    preadv = os.preadv

    def spy(fd: int, buffers: Sequence[memoryview], at: int) -> int:
        found.append(sum(map(len, buffers)))
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", spy)
    read(build.cut(cube, axis, *cut))
    assert found == expected


@quick(300)
@given(data=st.data())
def test_any_box_of_any_tensor_is_what_numpy_makes_of_it(stored: list[tuple[View, Array]], data: st.DataObject) -> None:
    """Cuts of cuts along any axes, then a range of rows."""
    view, array = data.draw(st.sampled_from(stored))
    for axis in data.draw(st.lists(st.integers(0, array.ndim - 1), max_size=5)):
        first = data.draw(st.integers(0, array.shape[axis] - 1))
        last = data.draw(st.integers(first + 1, array.shape[axis]))
        view, array = build.cut(view, axis, first, last), array.take(range(first, last), axis)
    assert view.shape == array.shape
    assert read(view).tolist() == array.tolist()
    first = data.draw(st.integers(0, array.shape[0] - 1))
    last = data.draw(st.integers(first + 1, array.shape[0]))
    assert read(view, (first, last)).tolist() == array[first:last].tolist()


def test_every_single_cut_of_every_tensor(stored: list[tuple[View, Array]]) -> None:
    for view, array in stored:
        for axis, size in enumerate(array.shape):
            for first in range(size):
                for last in range(first + 1, size + 1):
                    found = read(build.cut(view, axis, first, last))
                    assert found.tolist() == array.take(range(first, last), axis).tolist(), (array.shape, axis, first, last)
