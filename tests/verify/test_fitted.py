"""What calibration has fitted is not the source's, and verify holds it to the report; what it has not, to the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.calibrated import calibrated, worded
from helpers.disk import no_waiting
from helpers.models import copy, tensors
from helpers.results import edit, refused, sealed
from safetensors.torch import save_file

from ernie_quant.check.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

DOWN, NORM = "model.layers.1.mlp.shared_experts.down_proj.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worded(tmp_path_factory.mktemp("fitted") / "src")


@pytest.fixture(scope="module")
def template(source: Path) -> Path:
    with no_waiting():
        return calibrated(source, source.with_name("out"))


@pytest.fixture
def out(template: Path, tmp_path: Path) -> Path:
    return copy(template, tmp_path / "out")


def row_of(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda report: change(next(row for row in report["tensors"] if row["name"] == name))


def test_fitted_tensors_are_counted_and_nothing_else_is(source: Path, out: Path) -> None:
    """Of 34 that are kept, the shared down_proj of two layers; corrected experts are quantized, and count as such."""
    rows = json.loads((out / "report.json").read_text())["tensors"]
    fitted = [row["name"] for row in rows if row["codec"] == "kept, fitted"]
    assert (len(fitted), DOWN in fitted) == (2, True)
    assert any(row.get("fitted") and row["codec"].startswith("int4") for row in rows)
    found = verify(out, source)
    assert (found.compared.fitted, found.compared.kept, found.compared.reported, found.quantized) == (2, 32, 48, 48)
    assert verify(out, source, sample=1).compared.fitted == 1  # that with the largest change


def test_without_a_source_it_is_a_kept_tensor(out: Path) -> None:
    found = verify(out)
    assert (found.quantized, found.compared.total, dict(found.not_compared)) == (48, 0, {"no source": 82})


def test_the_smallest_change_shows(source: Path, out: Path) -> None:
    """One element near zero, in the files of a careful forger; and a checksum that is another."""
    table = tensors(out)
    flat = table[DOWN].view(-1)
    flat[flat.abs().argmin()] = 1e-30
    save_file(table, out / "model.safetensors", metadata={"format": "pt"})
    (line,) = refused(sealed(out), source)
    assert line.startswith(f"{DOWN}: its relative error is 0.0")


def test_another_checksum_shows(source: Path, out: Path) -> None:
    edit(out, "report.json", row_of(DOWN, lambda row: row.update(crc32="0" * 8)))
    (line,) = refused(out, source)
    assert line.startswith(f"{DOWN}: its stored bytes are not those that were written (crc32 ")


def test_a_report_that_calls_it_kept_is_found(source: Path, out: Path) -> None:
    edit(out, "report.json", row_of(DOWN, lambda row: row.update(codec="kept")))
    assert refused(out, source) == [f"{DOWN}: should be the source's bytes, and is not"]


def test_a_report_that_calls_a_kept_one_fitted_is_found(source: Path, out: Path) -> None:
    error = {"codec": "kept, fitted", "fitted": True, "rel_error": 1e-12}
    edit(out, "report.json", row_of("model.layers.0.mlp.down_proj.weight", lambda row: row.update(error)))
    (line,) = refused(out, source)
    assert line == "model.layers.0.mlp.down_proj.weight: its relative error is 0, the report says 1e-12"


def test_what_is_no_linear_is_never_fitted(source: Path, out: Path) -> None:
    table = tensors(out)
    table[NORM] = table[NORM] * 2
    save_file(table, out / "model.safetensors", metadata={"format": "pt"})
    edit(out, "report.json", row_of(NORM, lambda row: row.update(codec="kept, fitted", fitted=True)))
    assert refused(out, source) == [f"{NORM}: should be the source's bytes, and is not"]


def test_a_report_that_calls_it_quantized_is_found(out: Path) -> None:
    edit(out, "report.json", row_of(DOWN, lambda row: row.update(codec="int4, group 32, mse")))
    (line,) = refused(out)
    assert line.startswith(f"{DOWN}: the report says shared_experts, int4, group 32, mse (")
