"""What a weight lost, over several slabs: errors add up, and the largest is the largest of all."""

from __future__ import annotations

import itertools
import json
import os
from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch
from helpers.models import write
from helpers.synthetic import tiny, write_model

from ernie_quant.check.verify import verify
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.measure import Difference
from ernie_quant.planning.recipe import Recipe, RecipeRule

NAME = "model.layers.0.self_attn.q_proj.weight"
# absmax over groups of 32, each of which holds a 7: the scale is 7 / 7, and whole numbers are their own codes
RULES = Recipe("test", (RecipeRule(RoundToNearest(4, 32, "absmax"), match=r"layers\.0\.self_attn\.[qkv]_proj"),))
OFF = (0.25, 0.5, 0.125)  # how far a number is from the next whole one; exact in bf16
SQUARED = 0.0625 + 0.25 + 0.015625
every_order = pytest.mark.parametrize("order", list(itertools.permutations(OFF)), ids=str)


@every_order
def test_parts_add_up_in_any_order(order: tuple[float, ...]) -> None:
    parts = [Difference(error=off * off, total=1.0, largest=off) for off in order]
    assert reduce(add, parts, Difference()) == Difference(error=SQUARED, total=3.0, largest=0.5)


@every_order
def test_the_report_has_the_largest_error_of_all_slabs(
    order: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of 64 rows is done in slabs of 24, 24 and 16; in each of them one number is off."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("ernie_quant.views.read.SLAB_BYTES", 24 * 64 * 2)
    weight = torch.arange(64 * 64).remainder(15).sub(7).reshape(64, 64).float()  # -7 … 7, again and again
    for row, off in zip((5, 30, 63), order, strict=True):
        weight[row, 20] = 3 + off
    config, tensors = tiny("moe", "pt")
    assert tensors[NAME].shape == weight.shape
    source = write_model(tmp_path / "src", config, tensors | {NAME: weight.bfloat16()})
    write(source, tmp_path / "out", recipe=RULES)
    rows = json.loads((tmp_path / "out/report.json").read_text())["tensors"]
    (row,) = (row for row in rows if row["name"] == NAME)
    assert row["max_abs_error"] == 0.5
    assert row["squared_error"] == SQUARED
    assert row["squared_norm"] == weight.square().sum().item()
    assert verify(tmp_path / "out", source).against
