"""comparison.html: two results of a model side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ernie_quant.cli.main import group
from helpers.browser import Browser
from helpers.models import GOLDEN, invoke, write
from helpers.pages import HOSTILE, KEPT, WINT4, WINT8, data_of, folder_of, large, row

from ernie_quant.check.verify import verify
from ernie_quant.errors import OutputError
from ernie_quant.reporting import page, saved
from ernie_quant.reporting import rows as report
from ernie_quant.reporting.rows import TensorReport

NAMES = "[...document.querySelectorAll('#tensor-table tbody td:first-child')].map(cell => cell.textContent)"
LINES = """[...document.querySelectorAll('#%s tbody tr')].map(line => [...line.cells].map(cell => cell.textContent))"""
TICK = "{ const box = document.getElementById('%s'); box.checked = !box.checked; box.dispatchEvent(new Event('change')) }"

Make = Callable[..., Path]


def linear(name: str, codec: str, bits: float, error: float, *, layer: int = 0) -> TensorReport:
    return row(f"model.layers.{layer}.mlp.{name}.weight", "mlp", codec, (64, 100), bits, error)


A = [linear("up_proj", WINT4, 4, 0.010), linear("gate_proj", WINT4, 4, 0.012), linear("down_proj", KEPT, 16, 0.0)]
B = [linear("up_proj", WINT8, 8, 0.0001), linear("gate_proj", WINT4, 4, 0.012), linear("down_proj", WINT4, 4, 0.02)]


@pytest.fixture
def two(tmp_path: Path) -> Make:
    """The page of two results."""

    def made(a: list[TensorReport], b: list[TensorReport], **header: object) -> Path:
        for name, rows in (("left", a), ("right", b)):
            folder_of(tmp_path / name, rows, **header)
        written = page.write(saved.read(tmp_path / "left"), tmp_path / "page.html", saved.read(tmp_path / "right"))
        return written.path

    return made


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["report", *map(str, arguments)])


def test_the_command_writes_it_beside_the_page(results: dict[str, Path], tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", A), folder_of(tmp_path / "b", B)
    assert re.fullmatch(r".*/a/comparison\.html: 0\.0\d MB\n", run(a, "--against", b).output)
    assert (a / report.COMPARISON).read_bytes() == page.render_two(saved.read(a), saved.read(b))
    assert not (a / report.PAGE).exists()
    assert run(a, "--against", b, "--out", tmp_path / "x.html", "--quiet").output == ""
    assert (tmp_path / "x.html").read_bytes() == (a / report.COMPARISON).read_bytes()


def test_it_is_no_file_of_the_result(results: dict[str, Path], tmp_path: Path) -> None:
    """`verify` does not mind it, what is made of the result does not carry it along, and a new run sweeps it away."""
    out = tmp_path / "out"
    write(GOLDEN / "moe/paddle", out)
    assert run(out, "--against", results["moe"], "--quiet").exit_code == 0
    verify(out)
    invoke("convert", out, tmp_path / "back", "--to", "paddle", "--quiet")
    assert not (tmp_path / "back" / report.COMPARISON).exists()
    invoke("convert", GOLDEN / "moe/paddle", out, "--to", "pt", "--restart", "--quiet")
    assert not (out / report.COMPARISON).exists()


def test_what_cannot_be_compared_is_refused(results: dict[str, Path], tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", A)
    (tmp_path / "empty").mkdir()
    failed = run(a, "--against", tmp_path / "empty")
    assert "has no ernie-quant.json; a report is made from the folder of a finished result" in str(failed.exception)
    other = folder_of(tmp_path / "other", [replace(r, name=r.name + "x") for r in A])
    failed = run(a, "--against", other)
    assert str(failed.exception).startswith("a and other have no tensor of the same name and shape: are they of one model")
    assert isinstance(failed.exception, OutputError)
    for option in (("--plots",), ("--csv", tmp_path / "x.csv")):
        failed = run(a, "--against", other, *option)
        assert failed.exit_code == 2
        assert "--csv and --plots are of one result, --against shows two" in failed.output


def test_the_numbers_of_both_are_on_the_page(two: Make) -> None:
    data = data_of(two(A, B).read_text())
    (mlp,) = data["by_role"]
    assert [sums["bytes"] for sums in mlp["of"]] == [sum(r.bytes for r in rows) for rows in (A, B)]
    assert [sums["error"] for sums in mlp["of"]] == [0.011, pytest.approx(0.0107)]
    found = {s["parts"][1]: (s.get("error"), s.get("error_b")) for s in data["series"]}
    assert found == {
        ".mlp.up_proj.weight": ([0.01], [0.0001]),
        ".mlp.gate_proj.weight": ([0.012], [0.012]),
        ".mlp.down_proj.weight": (None, [0.02]),
    }
    assert data["only"] == [[], []]
    assert data["warnings"] == []


def test_other_shapes_and_repeated_names_are_other_tensors(two: Make) -> None:
    wide = replace(A[1], shape=(32, 200))
    data = data_of(two([A[0], A[0], A[1]], [A[0], wide]).read_text())
    assert [s["n"] for s in data["series"]] == [1]
    assert [[s["parts"][1] for s in only] for only in data["only"]] == [
        [".mlp.up_proj.weight", ".mlp.gate_proj.weight"], [".mlp.gate_proj.weight"],
    ]  # fmt: skip


def test_other_sources_are_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        out = folder_of(tmp_path / name, A)
        manifest = json.loads((out / "ernie-quant.json").read_text()) | {"source_name": f"of {name}"}
        manifest["source"]["config"] = name
        (out / "ernie-quant.json").write_text(json.dumps(manifest))
    a, b = (saved.read(tmp_path / name) for name in ("a", "b"))
    assert data_of(page.render_two(a, b).decode())["warnings"] == [
        "The two were made from sources with other config.json: they may not be of one model.",
        "A was made from of a, B from of b.",
    ]
    assert data_of(page.render_two(a, a).decode())["warnings"] == []


def test_tensors_that_differ_most_come_first(two: Make, browser: Browser) -> None:
    browser.open(two(A, B))
    assert browser.js(NAMES) == [f"model.layers.0.mlp.{x}_proj.weight" for x in ("down", "up")]
    lines = browser.js(LINES % "tensor-table")
    assert lines[0][:7] == [lines[0][0], "+0.0200", "\u2013", "0.0200", "\u2013", KEPT, WINT4]
    assert lines[1][:7] == [lines[1][0], "\u22120.00990", "0.0100", "1.00e-4", "0.01", WINT4, WINT8]
    browser.js(TICK % "alike")
    assert len(browser.js(NAMES)) == 3
    browser.js(TICK % "both")
    assert browser.js(NAMES) == [f"model.layers.0.mlp.{x}_proj.weight" for x in ("up", "gate")]
    totals = {name: numbers for name, *numbers in browser.js(LINES % "total-table")}
    assert totals["quantized"] == ["2", "3", "1.50"]
    assert totals["relative error, of the 2 tensors that both quantized"] == ["0.0110", "0.00605", "0.55"]
    assert totals["tensors on disk"] == ["19.2 kB", "12.8 kB", "0.67"]
    assert browser.js("document.querySelectorAll('#curves .dot').length") == 2
    assert browser.js("document.getElementById('alone').hidden") is True
    assert browser.complaints() == []


def test_bars_of_both_have_one_scale(two: Make, browser: Browser) -> None:
    page_of_two = two([*A, row("norm", "norms", KEPT, (7,), 16, 0)], B)
    browser.open(page_of_two)
    widths = browser.js("[...document.querySelectorAll('#roles .track > div')].map(bar => bar.getBoundingClientRect().width)")
    whole = browser.js("document.querySelector('#roles .track').getBoundingClientRect().width")
    expected = [sum(r.bytes for r in A), sum(r.bytes for r in B), 14, 0]
    assert widths == pytest.approx([whole * n / max(expected) for n in expected], abs=0.5)


def test_what_only_one_has_is_listed(two: Make, browser: Browser) -> None:
    browser.open(two([*A, linear("extra", KEPT, 16, 0, layer=3)], B[:2]))
    found = browser.js("[...document.querySelectorAll('#only > div')].map(list => list.textContent)")
    assert "only in left: 2 tensors" in found[0]
    assert "model.layers.3.mlp.extra.weight" in found[0]
    assert "only in right: 0 tensors" in found[1]


def test_two_that_agree_are_shown_too(two: Make, browser: Browser) -> None:
    kept = [linear("up_proj", KEPT, 16, 0)]
    browser.open(two(kept, kept))
    assert browser.js(NAMES) == ["model.layers.0.mlp.up_proj.weight"]
    assert browser.js("document.getElementById('curves').childElementCount") == 0
    assert browser.complaints() == []


def test_strangers_words_stay_words_in_both(two: Make, browser: Browser) -> None:
    rows = [row(name, name, name, (64, 64), 4.5, 0.01 + i / 1000) for i, name in enumerate(HOSTILE)]
    browser.open(two(rows, [replace(r, rel_error=2 * r.rel_error) for r in rows], notes=HOSTILE, recipe=HOSTILE[0]))
    assert browser.js("window.pwned") is None
    assert browser.js("document.images.length + document.querySelectorAll('[onload], [onerror]').length") == 0
    assert browser.js("document.scripts.length") == 2
    assert set(HOSTILE) - {HOSTILE[6]} < set(browser.js(NAMES))
    assert browser.complaints() == []


def test_the_large_one_is_small_and_fits_a_phone(two: Make, browser: Browser) -> None:
    changed = [replace(r, rel_error=r.rel_error * (1.05 if "down" in r.name else 0.97)) for r in large()]
    made = two(large(), changed)
    assert made.stat().st_size < 700_000
    browser.open(made, 360, 740, phone=True)
    assert browser.js("document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.js("innerWidth") == 360
    controls = "[...document.querySelectorAll('button, select, input[type=search]')].filter(b => b.offsetParent)"
    assert browser.js(f"Math.min(...{controls}.map(b => b.offsetHeight))") >= 44
    assert browser.js("document.getElementById('matches').textContent") == "100 of 20,568 tensors"
    browser.screenshot("comparison-phone")
    browser.open(made, dark=True)
    browser.screenshot("comparison-dark")
    assert browser.complaints() == []
