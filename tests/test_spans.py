"""Where rows of a weight lie in a stored tensor that has fewer of them: one scale for 128 rows, or four codes to a byte."""

from __future__ import annotations

import pytest
from helpers.synthetic import quick
from hypothesis import given
from hypothesis import strategies as st

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.runtimes import Part


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((0, 128), (0, 1)),
        ((128, 384), (1, 3)),
        ((0, 1), (0, 1)),  # one row needs the scale of its block
        ((127, 129), (0, 2)),  # two rows, of two blocks
        ((383, 384), (2, 3)),
    ],
)
def test_rows_of_a_weight_with_a_scale_for_128_of_them(rows: tuple[int, int], expected: tuple[int, int]) -> None:
    scale = Part(TensorSpec((3, 1), "F32"), 0, 1)
    assert scale.span(rows, 384) == expected


def test_outputs_may_be_columns_of_what_is_stored() -> None:
    """8 columns for 32 outputs, so that 4 share one; the 16 rows do not matter."""
    part = Part(TensorSpec((16, 8), "U8"), 1, 0)
    assert part.span((4, 12), 32) == (1, 3)
    assert part.span((5, 6), 32) == (1, 2)


@quick(200)
@given(data=st.data())
def test_a_span_holds_everything_that_the_rows_have_a_part_in(data: st.DataObject) -> None:
    size, each = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))  # `each` rows to one that is stored
    first = data.draw(st.integers(0, size * each - 1))
    last = data.draw(st.integers(first + 1, size * each))
    touched = {row // each for row in range(first, last)}
    assert Part(TensorSpec((size,), "F32")).span((first, last), size * each) == (min(touched), max(touched) + 1)
