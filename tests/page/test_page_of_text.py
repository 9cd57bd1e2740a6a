"""The page of a calibrated result: errors of outputs, drift, tokens of experts. Other pages have none of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.browser import Browser
from helpers.pages import WINT4, data_of, folder_of, measured, row, text_of

from ernie_quant.errors import OutputError
from ernie_quant.reporting import page, saved
from ernie_quant.reporting import rows as report

CELLS = "document.querySelectorAll('.plot canvas')[%d].toDataURL()"
COLUMN = """(() => {
  const table = document.querySelector('table[aria-label="%s"]');
  const at = [...table.querySelectorAll('th')].findIndex(head => head.textContent === '%s');
  return [...table.querySelectorAll('tbody tr')].map(line => line.cells[at].textContent);
})()"""


def test_other_pages_have_none_of_it(results: dict[str, Path]) -> None:
    script = (page.PAGES / page.OF_TEXT).read_text()
    for name in ("dense", "moe", "large", "converted"):
        text = text_of(results[name])
        assert script not in text
        assert "calibration" not in data_of(text)
        assert '"output":' not in text
    assert script in text_of(results["calibrated"])


def test_the_data_are_those_of_the_report(results: dict[str, Path]) -> None:
    data, found = data_of(text_of(results["calibrated"])), saved.read(results["calibrated"])
    of_page = sorted(x for s in data["series"] for x in s.get("output", []) if x is not None)
    of_report = sorted(r.output_error for r in found.rows if r.output_error is not None)
    assert of_page == pytest.approx(of_report, rel=5e-3)
    assert len(of_page) >= 48
    said = found.header["calibration"]
    assert data["calibration"]["experts"] == {str(x["layer"]): x["expert_tokens"] for x in said["layers"] if "expert_tokens" in x}
    assert [layer for layer, _ in data["calibration"]["drift"]] == [0, 1, 2]
    assert [line.get("drift") for line in data["by_layer"] if line["name"] == "layer 2"] == pytest.approx(
        [said["layers"][2]["drift"]], rel=1e-3
    )


def test_54_layers_of_128_experts_take_no_more_than_they_may(results: dict[str, Path]) -> None:
    assert (results["large-calibrated"] / report.PAGE).stat().st_size < 700_000


def test_what_no_run_writes_is_left_out(tmp_path: Path) -> None:
    rows, said = measured([row("model.layers.0.mlp.experts.0.up_proj.weight", "experts", "int4", (4, 4), 4, 0.1)])
    for i, odd in enumerate(
        (None, 3, {"layers": [{"layer": 1, "drift": "x", "expert_tokens": {"a": 1}}], "name": 5}, said | {"tokens": -1})
    ):
        out = folder_of(tmp_path / str(i), rows, calibration=odd)
        shown = data_of(page.render(saved.read(out)).decode())["calibration"]
        assert (shown["tokens"], shown["fit"] or i < 3) == (0, True)


@pytest.mark.parametrize(
    "change", [{"output_error": "x"}, {"output_error": -1}, {"fitted": 1}, {"calibration_tokens": 1.5}], ids=str
)
def test_a_row_of_other_types_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [row("a.weight", "mlp", "int4", (4, 4), 4, 0.1)])
    text = json.loads((out / "report.json").read_text())
    text["tensors"][0] |= change
    (out / "report.json").write_text(json.dumps(text))
    with pytest.raises(OutputError, match=r"tensor 1 is not as a run writes it"):
        saved.read(out)


def test_tables_have_both_errors(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large-calibrated"] / report.PAGE)
    weights, outputs = (browser.js(COLUMN % ("Tensors", head)) for head in ("rel. error", "output error"))
    assert len(weights) == len(outputs) == 100
    assert all(float(o) == pytest.approx(float(w) / 3, rel=0.02) for w, o in zip(weights, outputs, strict=True))
    assert browser.js(COLUMN % ("Layers", "drift"))[:2] == ["1.23e-4", "2.47e-4"]
    assert browser.js(COLUMN % ("Roles", "output error")).count("\u2013") >= 3  # what text did not change
    browser.screenshot("large-calibrated")
    assert browser.complaints() == []


def test_the_section_shows_drift_and_the_experts_with_the_fewest_tokens(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large-calibrated"] / report.PAGE)
    text = browser.js("document.getElementById('calibration').textContent")
    assert "auto: 16,384 tokens to fit to, 2,560 to judge by; method descent; o_proj and shared down_proj fitted too." in text
    assert len(browser.js(COLUMN % ("Drift", "layer"))) == 53
    first = [browser.js(COLUMN % ("Experts", head))[0] for head in ("layer", "expert", "tokens")]
    assert first == ["9", "5", "0"]
    browser.js("document.getElementById('calibration').scrollIntoView()")
    browser.settle()
    browser.screenshot("large-calibrated-section")


def test_the_heatmaps_show_errors_of_outputs_too(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["calibrated"] / report.PAGE)
    before = browser.js(CELLS % 0)
    choose = "{ const c = document.getElementById('error-of'); c.value = '%s'; c.dispatchEvent(new Event('change')) }"
    browser.js(choose % "outputs")
    assert browser.js(CELLS % 0) != before
    browser.screenshot("calibrated-outputs")
    browser.js(choose % "")
    assert browser.js(CELLS % 0) == before
    assert browser.complaints() == []


@pytest.mark.parametrize(("part", "grey"), [(4, True), (2, False)], ids=["a quarter", "more than half"])
def test_what_makes_up_for_errors_is_no_outlier(part: int, grey: bool, tmp_path: Path, browser: Browser) -> None:
    name = "model.layers.0.mlp.experts.%d.up_proj.weight"
    plain = [row(name % i, "experts", WINT4, (64, 64), 4, 0.01 + i / 1e5) for i in range(41)]
    rows = [replace(r, rel_error=0.2, fitted=True) if not i % part else r for i, r in enumerate(plain)]
    rows, said = measured(rows)
    out = folder_of(tmp_path / "out", rows, calibration=said)
    browser.open(page.write(saved.read(out), out / report.PAGE).path)
    assert browser.js("DATA.series.filter(s => s.fitted).every(s => outlier(s.first) === 0 && timesMedian(s.first) === null)")
    assert browser.js("document.querySelector('.legend').textContent").endswith("meant to differ") is grey
    texts = "[...document.querySelector('.legend .ramp').childNodes].filter(node => node.nodeType === 3)"
    low, high = browser.js(f"{texts}.map(node => Number(node.data))")
    assert low < high < (0.012 if grey else 0.3)
    usual = browser.js("document.querySelector('#codec-table tbody tr').cells[6].textContent")
    assert usual == ("0.00816 to 0.0127" if grey else "most are meant to differ")
    assert browser.complaints() == []


def test_a_cell_tells_its_output_error_and_tokens(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large-calibrated"] / report.PAGE)
    browser.js("document.querySelectorAll('.plot canvas')[0].focus()")
    browser.press("ArrowRight")
    tip = browser.js("document.getElementById('tip').textContent")
    assert "relative error 0.0" in tip
    assert "output error 0.0" in tip
    assert tip.endswith("fitted to 16,384 tokensexpert given 1,001 tokens of the text")


def test_it_opens_at_once(results: dict[str, Path], browser: Browser) -> None:
    times = []
    for _ in range(3):
        browser.open(results["large-calibrated"] / report.PAGE)
        times.append(browser.js("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert min(times) < 1500, times
