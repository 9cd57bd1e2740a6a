from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import exact, quick, write_pdparams, write_safetensors
from hypothesis import given
from hypothesis import strategies as st

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import CheckpointError
from ernie_quant.readers import read_header
from ernie_quant.views import build, kinds
from ernie_quant.views import read as views_read
from ernie_quant.views.build import cat, cut, fold, leaf, replicated, transpose, unfold
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Cat, Cut, Decoded, Fold, Leaf, Replicated, T, Unfold, View
from ernie_quant.views.read import slabs

Matrix = np.ndarray[Any, Any]
STORED = {
    "tall": np.arange(0, 35, dtype="f4").reshape(7, 5),
    "wide": np.arange(100, 136, dtype="f4").reshape(4, 9),
    "row": np.arange(200, 206, dtype="f4").reshape(1, 6),
    "column": np.arange(300, 303, dtype="f4").reshape(3, 1),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[View, Matrix]]:
    """Every way a matrix can lie in a file, each with the matrix."""
    folder = tmp_path_factory.mktemp("views")
    tensors = {name: torch.from_numpy(a) for name, a in STORED.items()}
    write_safetensors(folder / "plain.safetensors", tensors)
    write_pdparams(folder / "split.pdparams", tensors, 3, split_above=4)
    write_pdparams(folder / "text.pdparams", tensors, 2)
    (folder / "fortran.pdparams").write_bytes(pickle.dumps({n: np.asfortranarray(a) for n, a in STORED.items()}, 4))
    return [(leaf(ref), STORED[ref.name]) for file in sorted(folder.iterdir()) for ref in read_header(file)]


@pytest.fixture(scope="module")
def plain(stored: list[tuple[View, Matrix]]) -> dict[str, View]:
    return {view.ref.name: view for view, _ in stored if isinstance(view, Leaf) and view.ref.file.suffix == ".safetensors"}


def inner_edges(n: int) -> st.SearchStrategy[set[int]]:
    """Places to split a dimension of `n` at."""
    return st.sets(st.integers(1, n - 1), max_size=4) if n > 1 else st.just(set())


def read(view: View, rows: tuple[int, int] | None = None) -> Matrix:
    with Files() as files:
        tensor = views_read.read(view, files, rows)
    assert tensor.is_contiguous()
    return tensor.numpy()


@dataclass(frozen=True)
class Negative:
    """A matrix that is computed: minus a stored one, readable in slabs of two rows only."""

    base: View

    @property
    def spec(self) -> TensorSpec:
        return kinds.spec_of(self.base)

    @property
    def parts(self) -> Mapping[str, View]:
        return {"base": self.base}

    def slabs(self) -> list[tuple[int, int]]:
        n = self.base.shape[0]
        return [(first, min(first + 2, n)) for first in range(0, n, 2)]

    def read(self, files: Files, rows: tuple[int, int], device: str = "cpu") -> torch.Tensor:
        assert rows in self.slabs()
        return -views_read.read(self.base, files, rows, device)


def test_views_of_a_matrix_by_hand(plain: dict[str, View]) -> None:
    wide = plain["wide"]  # 100 … 108, 109 … 117, 118 … 126, 127 … 135
    assert wide.shape == (4, 9)
    assert wide.dtype == "F32"
    assert read(cut(wide, 1, 2, 4)).tolist() == [[102, 103], [111, 112], [120, 121], [129, 130]]
    assert read(cut(wide, 0, 1, 3), (1, 2)).tolist() == [list(range(118, 127))]
    assert read(transpose(wide), (8, 9)).tolist() == [[108, 117, 126, 135]]
    assert read(cat([cut(wide, 1, 8, 9), plain["column"]], 0)).tolist() == [[108], [117], [126], [135], [300], [301], [302]]


def test_a_view_of_a_tensor_with_no_or_three_dimensions(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(7.5), "cube": torch.arange(24.0).reshape(4, 3, 2), "vector": torch.arange(5.0)}
    by_name = {r.name: leaf(r) for r in read_header(write_safetensors(tmp_path / "m.safetensors", tensors))}
    assert read(by_name["scalar"]).item() == 7.5
    assert read(by_name["scalar"], (0, 1)).item() == 7.5
    assert read(by_name["cube"], (1, 3)).tolist() == tensors["cube"][1:3].tolist()
    assert read(cat([cut(by_name["vector"], 0, 3, 5), cut(by_name["vector"], 0, 0, 1)], 0)).tolist() == [3, 4, 0]


def test_one_of_a_stack_of_matrices(tmp_path: Path) -> None:
    cube = torch.arange(24.0).reshape(4, 3, 2)
    (stack,) = (leaf(ref) for ref in read_header(write_safetensors(tmp_path / "m.safetensors", {"cube": cube})))
    one = build.pick(stack, 2)  # 12, 13 / 14, 15 / 16, 17
    assert (one.shape, one.dtype) == ((3, 2), "F32")
    assert read(one).tolist() == [[12, 13], [14, 15], [16, 17]]
    assert read(one, (1, 2)).tolist() == [[14, 15]]
    assert read(transpose(one), (1, 2)).tolist() == [[13, 15, 17]]
    assert read(cut(transpose(cut(one, 0, 1, 3)), 1, 1, 2)).tolist() == [[16], [17]]
    assert cat([cut(one, 0, 0, 1), cut(one, 0, 1, 3)], 0) == one  # gate and up are one again
    assert read(cat([cut(one, 0, 2, 3), build.pick(stack, 0)], 0)).tolist() == [[16, 17], [0, 1], [2, 3], [4, 5]]
    assert [ref.name for ref in build.refs(transpose(one))] == ["cube"]


def test_a_matrix_folded_by_hand(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"m": torch.arange(12).reshape(4, 3)})
    (matrix,) = (leaf(ref) for ref in read_header(tmp_path / "m.safetensors"))
    assert fold(matrix, 2) == Fold(matrix, 2)
    assert fold(matrix, 2).shape == (2, 6)
    assert read(fold(matrix, 2)).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert read(fold(matrix, 4)).tolist() == [list(range(12))]
    assert unfold(matrix, 3).shape == (12, 1)
    assert read(unfold(matrix, 3), (4, 6)).tolist() == [[4], [5]]
    # what a rank's share of the inputs is, where two rows are interleaved: half of the columns of both
    halves = [unfold(cut(fold(matrix, 2), 1, a, a + 2), 2) for a in (0, 2, 4)]
    assert [h.shape for h in halves] == [(4, 1)] * 3
    assert [read(h).flatten().tolist() for h in halves] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert read(halves[1], (1, 3)).tolist() == [[3], [8]]  # a slab that begins within a folded row
    assert read(unfold(cat([fold(h, 2) for h in halves], 1), 2)).tolist() == read(matrix).tolist()


def test_what_is_computed_is_read_in_its_own_slabs(plain: dict[str, View]) -> None:
    wide = Decoded(Negative(plain["wide"]))
    assert (wide.shape, wide.dtype) == ((4, 9), "F32")
    assert read(wide, (1, 3)).tolist() == [list(range(-109, -118, -1)), list(range(-118, -127, -1))]
    assert read(cut(transpose(wide), 0, 8, 9)).tolist() == [[-108, -117, -126, -135]]
    assert [r.name for r in build.refs(wide)] == ["wide"]


def copies_of(tmp_path: Path, change: float) -> list[View]:
    """m of rank0/model.safetensors and of rank1/model.safetensors, where `change` is added to its last number."""
    found = []
    for rank, more in enumerate((0.0, change)):
        tensor = torch.arange(12.0).reshape(4, 3)
        tensor[3, 2] += more
        (tmp_path / f"rank{rank}").mkdir()
        found += read_header(write_safetensors(tmp_path / f"rank{rank}/model.safetensors", {"m": tensor}))
    return [leaf(ref) for ref in found]


def test_copies_are_one_tensor(tmp_path: Path) -> None:
    one, other = copies_of(tmp_path, 0)
    assert replicated([one]) is one
    assert replicated([one, other]) == Replicated((one, other))
    assert transpose(replicated([one, other])) == Replicated((T(one), T(other)))
    assert read(replicated([one, other])).tolist() == np.arange(12).reshape(4, 3).tolist()
    assert [r.file.parent.name for r in build.refs(replicated([one, other]))] == ["rank0", "rank1"]


@pytest.mark.parametrize("change", [1.0, float("nan")])
def test_copies_that_differ_are_named_with_both_files(change: float, tmp_path: Path) -> None:
    both = replicated(copies_of(tmp_path, change))
    line = "m: differs between rank0/model.safetensors and rank1/model.safetensors; every rank must have the same"
    for view in (both, transpose(both), fold(both, 2), cut(both, 1, 2, 3)):
        with pytest.raises(CheckpointError) as error:
            read(view)
        assert str(error.value) == line
    assert read(both, (0, 3)).tolist() == np.arange(9).reshape(3, 3).tolist()  # the rows that agree


# --- what simplifies -------------------------------------------------------------------------------------------------


def test_what_cancels_leaves_the_leaf_itself(plain: dict[str, View]) -> None:
    tall = plain["tall"]
    assert transpose(transpose(tall)) is tall
    assert cut(tall, 0, 0, 7) is tall
    for axis, n in ((0, 7), (1, 5)):
        assert cat([cut(tall, axis, 0, 2), cut(tall, axis, 2, 3), cut(tall, axis, 3, n)], axis) is tall
        # Paddle -> PT -> Paddle of a fused linear: transposed, split, joined, transposed back
        pieces = [cut(transpose(tall), axis, i, i + 1) for i in range(tall.shape[1 - axis])]
        assert transpose(cat(pieces, axis)) == tall


def test_what_is_folded_and_unfolded_is_the_view_itself(plain: dict[str, View]) -> None:
    tall = plain["tall"]
    assert fold(tall, 1) is unfold(tall, 1) is tall
    assert unfold(fold(tall, 7), 7) is tall
    assert fold(unfold(tall, 5), 5) is tall
    assert fold(unfold(tall, 5), 7) == Fold(Unfold(tall, 5), 7)


def test_a_cut_of_a_cut_is_one_cut(plain: dict[str, View]) -> None:
    tall = plain["tall"]
    assert cut(cut(tall, 0, 1, 6), 0, 2, 4) == Cut(tall, 0, 3, 5)
    assert transpose(Cut(tall, 0, 3, 5)) == Cut(T(tall), 1, 3, 5)
    assert cat([cut(tall, 0, 0, 2), cut(tall, 0, 3, 7)], 0) == Cat((Cut(tall, 0, 0, 2), Cut(tall, 0, 3, 7)), 0)
    assert cat([cut(tall, 0, 2, 7), cut(tall, 0, 0, 2)], 0).shape == (7, 5)  # in the wrong order they stay apart


def test_parts_of_several_dtypes_are_not_joined(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2, dtype=torch.bfloat16)})
    a, b = (leaf(ref) for ref in read_header(tmp_path / "m.safetensors"))
    line = r"a \(.*/m.safetensors\) is F32, b \(.*/m.safetensors\) is BF16: they are parts of one tensor"
    with pytest.raises(CheckpointError, match=line):
        cat([transpose(a), cut(a, 1, 0, 1), b], 0)


def test_refs_are_the_stored_tensors_each_once(plain: dict[str, View]) -> None:
    tall, column = plain["tall"], plain["column"]
    joined = cat([transpose(cut(tall, 1, 0, 1)), transpose(cut(tall, 1, 4, 5)), transpose(cut(tall, 1, 1, 2))], 0)
    assert [r.name for r in build.refs(joined)] == ["tall"]
    assert [r.name for r in build.refs(cat([cut(tall, 1, 0, 1), column], 0))] == ["tall", "column"]


@quick(150)
@given(data=st.data())
def test_a_split_in_any_places_joins_to_the_view_itself(plain: dict[str, View], data: st.DataObject) -> None:
    view = data.draw(st.sampled_from([plain["tall"], transpose(plain["wide"]), cat([plain["tall"], plain["tall"]], 1)]))
    axis = data.draw(st.sampled_from([0, 1]))
    edges = [0, *sorted(data.draw(inner_edges(view.shape[axis]))), view.shape[axis]]
    pieces = [cut(view, axis, a, b) for a, b in itertools.pairwise(edges)]
    assert cat(pieces, axis) == view


# --- the same as numpy -----------------------------------------------------------------------------------------------


def draw_tree(data: st.DataObject, stored: list[tuple[View, Matrix]]) -> tuple[View, Matrix]:
    """A view grown by random steps, and the matrix that numpy makes by the same steps."""
    view, matrix = data.draw(st.sampled_from(stored))
    for _ in range(data.draw(st.integers(0, 6))):
        axis = data.draw(st.sampled_from([0, 1]))
        n = matrix.shape[axis]
        match data.draw(st.sampled_from(["transpose", "cut", "shuffle", "join", "fold", "unfold", "same", "decoded"])):
            case "transpose":
                view, matrix = transpose(view), matrix.T
            case "cut":
                a = data.draw(st.integers(0, n - 1))
                b = data.draw(st.integers(a + 1, n))
                view, matrix = cut(view, axis, a, b), matrix.take(range(a, b), axis)
            case "shuffle":
                edges = [0, *sorted(data.draw(inner_edges(n))), n]
                pieces = data.draw(st.permutations(list(itertools.pairwise(edges))))
                view = cat([cut(view, axis, a, b) for a, b in pieces], axis)
                matrix = np.concatenate([matrix.take(range(a, b), axis) for a, b in pieces], axis)
            case "join" if matrix.size < 200:
                other, second = data.draw(st.sampled_from(stored))
                m = min(matrix.shape[1 - axis], second.shape[1 - axis])
                view = cat([cut(view, 1 - axis, 0, m), cut(other, 1 - axis, 0, m)], axis)
                matrix = np.concatenate([matrix.take(range(m), 1 - axis), second.take(range(m), 1 - axis)], axis)
            case "fold":
                by = data.draw(st.sampled_from([i for i in range(1, 8) if matrix.shape[0] % i == 0]))
                view, matrix = fold(view, by), matrix.reshape(-1, matrix.shape[1] * by)
            case "unfold":
                by = data.draw(st.sampled_from([i for i in range(1, 8) if matrix.shape[1] % i == 0]))
                view, matrix = unfold(view, by), matrix.reshape(-1, matrix.shape[1] // by)
            case "same":
                view = replicated([view, transpose(transpose(view))])
            case "decoded":
                view, matrix = Decoded(Negative(view)), -matrix
    return view, matrix


@quick(400)
@given(data=st.data())
def test_any_tree_of_views_is_what_numpy_makes_of_it(stored: list[tuple[View, Matrix]], data: st.DataObject) -> None:
    view, matrix = draw_tree(data, stored)
    assert view.shape == matrix.shape
    assert read(view).tolist() == matrix.tolist()
    first = data.draw(st.integers(0, matrix.shape[0] - 1))
    last = data.draw(st.integers(first + 1, matrix.shape[0]))
    assert read(view, (first, last)).tolist() == matrix[first:last].tolist()
    step = data.draw(st.integers(1, matrix.shape[0]))
    rows = [read(view, (a, min(a + step, matrix.shape[0]))) for a in range(0, matrix.shape[0], step)]
    assert np.concatenate(rows).tolist() == matrix.tolist()


def test_rows_of_a_joint_touch_only_the_files_that_hold_them(stored: list[tuple[View, Matrix]]) -> None:
    parts = [view for view, matrix in stored if matrix.shape == (7, 5)]
    joined = cat(parts, 0)
    assert joined.shape == (28, 5)
    with Files() as files:
        views_read.read(joined, files, (8, 13))
        assert files._read == {ref.file for ref in build.refs(parts[1])}


# --- slabs -----------------------------------------------------------------------------------------------------------


def test_slabs_are_about_32_mib_in_whole_blocks_of_rows() -> None:
    mib = 1 << 20
    assert slabs(TensorSpec((10, 10), "F32")) == [(0, 10)]
    assert slabs(TensorSpec((100, mib), "U8")) == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert slabs(TensorSpec((300, mib), "BF16"), multiple=128) == [(0, 128), (128, 256), (256, 300)]
    assert slabs(TensorSpec((2, 64 * mib), "U8")) == [(0, 1), (1, 2)]  # a row is never cut
    assert slabs(TensorSpec((), "F32")) == [(0, 1)]
    assert slabs(TensorSpec((0, 5), "F32")) == []


def test_slabs_of_a_scalar_a_vector_and_a_matrix_read_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"s": torch.tensor(1.0), "v": torch.arange(50.0), "m": torch.arange(60.0).reshape(20, 3)}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 36)  # three rows of the matrix
    with Files() as files:
        for ref in read_header(tmp_path / "m.safetensors"):
            pieces = [views_read.read(leaf(ref), files, rows) for rows in slabs(ref.spec)]
            whole = pieces[0] if ref.name == "s" else torch.cat(pieces)
            assert exact({ref.name: whole}) == exact({ref.name: tensors[ref.name]})
            assert len(pieces) == {"s": 1, "v": 6, "m": 7}[ref.name]


def test_files_are_closed_when_they_are_left(plain: dict[str, View]) -> None:
    files = Files()
    with files:
        views_read.read(plain["tall"], files)
        assert len(files._open) == 1
    assert not files._open


def test_threads_share_open_files(stored: list[tuple[View, Matrix]]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    joined = [(cat([v, transpose(transpose(v))], 0), np.concatenate([m, m])) for v, m in stored] * 5
    with Files() as files, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda item: views_read.read(item[0], files).tolist(), joined))
        assert len(files._open) == 4
    assert results == [m.tolist() for _, m in joined]
