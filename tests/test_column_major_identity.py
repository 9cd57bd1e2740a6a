"""A weight that is stored column-major is another weight than the same bytes row-major, and so is the result."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
from helpers.synthetic import array, golden

from ernie_quant.errors import OutputError
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

SQUARE = "ernie.layers.0.self_attn.o_proj.weight"  # [64, 64]: its shape is the same either way


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def planned(folder: Path, *, column_major: bool) -> Plan:
    """A pickled model, one weight of which may be transposed: numpy pickles that as a flag beside the same bytes."""
    config, tensors = golden("moe", "paddle")
    table = {name: array(tensor) for name, tensor in tensors.items()}
    if column_major:
        table[SQUARE] = table[SQUARE].T
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(table, 4))
    return make_plan(open_source(folder), runtime="vllm")


def test_the_two_files_differ_in_one_byte(tmp_path: Path) -> None:
    """The next test would say little if sizes or offsets told them apart."""
    one, other = planned(tmp_path / "rows", column_major=False), planned(tmp_path / "columns", column_major=True)
    left, right = ((plan.source.folder / "model_state.pdparams").read_bytes() for plan in (one, other))
    assert len(left) == len(right)
    assert sum(a != b for a, b in zip(left, right, strict=True)) == 1
    row_major, column_major = one.source.refs[SQUARE], other.source.refs[SQUARE]
    assert (row_major.fortran, column_major.fortran) == (False, True)
    assert (row_major.spec, row_major.extents) == (column_major.spec, column_major.extents)


def test_a_result_of_the_row_major_file_is_not_that_of_the_column_major_one(tmp_path: Path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    run_plan(planned(source, column_major=False), out)
    assert run_plan(planned(source, column_major=False), out).complete_before
    with pytest.raises(OutputError) as error:
        run_plan(planned(source, column_major=True), out)
    said = r"another plan \(source files model_state\.pdparams header: is [0-9a-f]{12}…, was [0-9a-f]{12}…\)"
    assert re.search(said, str(error.value))
