"""Rows as CSV: by the command, and by the button of the page; no spreadsheet takes a name for a formula."""

from __future__ import annotations

import csv
import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from ernie_quant.cli.main import group
from helpers.browser import Browser
from helpers.pages import HOSTILE, WINT4, folder_of, over_results, row

from ernie_quant.errors import OutputError
from ernie_quant.reporting import page, saved, spreadsheet
from ernie_quant.reporting import rows as report

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", '"=1"', "a,=1", "a;@b", "a|-1", "\t=1", "\r\n=cmd", "\uff1d1"]


def read(text: str) -> list[dict[str, str]]:
    assert text.endswith("\r\n")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def command(*arguments: object) -> str:
    result = CliRunner().invoke(group, ["report", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@over_results
def test_every_row_is_in_the_file(name: str, results: dict[str, Path], tmp_path: Path) -> None:
    found = saved.read(results[name])
    text = spreadsheet.render(found).decode()
    lines = read(text)
    assert len(lines) == len(found.rows) == text.count("\r\n") - 1
    for line, r in zip(lines, found.rows, strict=True):
        assert (int(line["bytes"]), float(line["rel_error"])) == (r.bytes, r.rel_error)
        assert line["shape"] == "x".join(map(str, r.shape))
        assert line["sqnr_db"] == ("" if r.sqnr_db is None else repr(r.sqnr_db))
        assert line["output_error"] == ("" if r.output_error is None else repr(r.output_error))
        if name != "hostile":
            assert (line["name"], line["role"], line["codec"], line["sources"]) == (r.name, r.role, r.codec, " ".join(r.sources))


def test_the_text_by_hand(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [row('a"b', "mlp", "int4, group 64, mse", (2, 64), 4, 0.7)])
    head, line, end = spreadsheet.render(saved.read(out)).decode().split("\r\n")
    assert head == ",".join(f'"{name}"' for name in spreadsheet.HEAD)
    assert line == (
        '"a""b","mlp","int4, group 64, mse","2x64",64,4,0.7,1.5490195998574319,0.09999999999999999,'
        '0.00822,,,,,0,,"a""b","00000000"'
    )
    assert end == ""


def test_outliers_are_marked(results: dict[str, Path]) -> None:
    lines = read(spreadsheet.render(saved.read(results["large"])).decode())
    assert [line["name"] for line in lines if line["outlier"]] == ["model.layers.31.mlp.experts.77.up_proj.weight"]
    assert {line["gaussian_error"] for line in lines if line["role"] == "experts" and line["outlier"]} == {"0.1025"}


@pytest.mark.parametrize("name", FORMULAS)
def test_no_cell_is_a_formula(name: str) -> None:
    """Whatever a program takes for the end of a cell."""
    written = spreadsheet.cell(name)
    assert not [cell for cell in re.split(r"[,;|\t]", written) if cell.lstrip(' "')[:1] in "=+-@\uff1d"]
    assert written.isprintable()


def test_numbers_stay_numbers() -> None:
    assert [spreadsheet.cell(x) for x in (-3.5, 0, 1e-7, None, "", "-7")] == ["-3.5", "0", "1e-07", "", "", '"\'-7"']


def test_the_command_writes_it_too(results: dict[str, Path], tmp_path: Path) -> None:
    out, file = folder_of(tmp_path / "out", [row("x", "mlp", WINT4, (4, 4), 4, 0.1)]), tmp_path / "x.csv"
    assert [line.partition(": ")[0] for line in command(out, "--csv", file).splitlines()] == [str(out / "report.html"), str(file)]
    assert file.read_bytes() == spreadsheet.render(saved.read(out))
    with pytest.raises(OutputError, match=r"nowhere/x\.csv: cannot be written: No such file"):
        command(out, "--csv", tmp_path / "nowhere/x.csv")


# --- the button ------------------------------------------------------------------------------------------------------


def save(browser: Browser, folder: Path) -> str:
    """What the browser saves at a click."""
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.js("document.getElementById('save').click()")
    end = time.monotonic() + 30
    while not (found := [p for p in folder.glob("*.csv") if p.stat().st_size]):
        assert time.monotonic() < end, browser.complaints()
        time.sleep(0.05)
    (file,) = found
    text = file.read_bytes().decode()
    file.unlink()
    return text


def test_the_button_saves_what_the_table_shows(results: dict[str, Path], tmp_path: Path, browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    assert browser.js("document.getElementById('save').textContent") == "Save 20,568 rows as CSV"
    browser.js("{ const f = document.getElementById('filter'); f.value = 'experts.77. up'; f.dispatchEvent(new Event('input')) }")
    assert browser.js("document.getElementById('save').textContent") == "Save 53 rows as CSV"
    lines = read(save(browser, tmp_path))
    assert len(lines) == 53
    assert lines[0]["name"] == "model.layers.31.mlp.experts.77.up_proj.weight"
    assert (lines[0]["outlier"], lines[0]["codec"], lines[0]["shape"]) == ("high", "wint2 (CCQ)", "3584x8192")
    of_file = {line["name"]: line for line in read(spreadsheet.render(saved.read(results["large"])).decode())}
    for line in lines:
        for key in line.keys() & set(spreadsheet.HEAD):
            there = of_file[line["name"]][key]
            try:
                assert float(line[key]) == pytest.approx(float(there), rel=1e-3)
            except ValueError:
                assert line[key] == there
    assert browser.complaints() == []


def test_the_button_writes_no_formulas_either(tmp_path: Path, browser: Browser) -> None:
    names = [*FORMULAS, *HOSTILE]
    rows = [replace(row(name, name, name, (8, 8), 4, 0.01), sources=(name,)) for name in names]
    out = folder_of(tmp_path / "out", rows)
    browser.open(page.write(saved.read(out), out / report.PAGE).path)
    by_button = sorted(line["name"] for line in read(save(browser, tmp_path)))
    assert by_button == sorted(line["name"] for line in read(spreadsheet.render(saved.read(out)).decode()))
    assert all(name.lstrip()[:1] not in "=+-@" for name in by_button)
