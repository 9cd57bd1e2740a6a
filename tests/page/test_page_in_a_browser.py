"""report.html in a real browser: it opens, fits a phone, sorts and filters, and keeps strangers' words words."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import Browser
from helpers.pages import HOSTILE, TIMES, WINT2, WINT4, over_results

from ernie_quant.report import rows as report

CELLS = """(() => {
  const canvas = document.querySelectorAll('.plot canvas')[%d];
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height), found = {};
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) {
    const key = data.slice(i, i + 3).join();
    found[key] = (found[key] || 0) + 1;
  }
  return found;
})()"""
NAMES = "[...document.querySelectorAll('#tensor-table tbody td:first-child')].map(cell => cell.textContent)"
ERRORS = "[...document.querySelectorAll('#tensor-table tbody td:nth-child(2)')].map(cell => Number(cell.textContent))"


@over_results
def test_it_opens_without_a_word_and_asks_for_nothing(name: str, results: dict[str, Path], browser: Browser) -> None:
    browser.open(results[name] / report.PAGE)
    assert browser.complaints() == []
    assert [r["request"]["url"] for r in browser.of("Network.requestWillBeSent")] == [(results[name] / report.PAGE).as_uri()]
    canvases = browser.js("document.querySelectorAll('.plot canvas').length")
    # gate, up and down of the experts (of VL models twice), or up_gate and down; and all other linears
    expected = {
        "dense": 1,
        "moe": 4,
        "moe_mtp": 4,
        "vl": 7,
        "converted": 0,
        "container": 3,
        "calibrated": 4,
        "large": 4,
        "hostile": 1,
    }
    assert canvases == expected[name]
    for i in range(canvases):
        colours = browser.js(CELLS % i)
        assert len(colours) > 2, colours
    browser.screenshot(f"{name}-light")


@over_results
def test_it_fits_a_phone(name: str, results: dict[str, Path], browser: Browser) -> None:
    browser.open(results[name] / report.PAGE, 360, 740, phone=True)
    assert browser.js("document.scrollingElement.scrollWidth <= innerWidth")
    assert browser.js("innerWidth") == 360
    controls = "[...document.querySelectorAll('button, select, input[type=search]')].filter(b => b.offsetParent)"
    assert browser.js(f"Math.min(...{controls}.map(b => b.offsetHeight))") >= 44
    browser.screenshot(f"{name}-phone")


def test_it_is_dark_and_light(results: dict[str, Path], browser: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for dark in (False, True):
        browser.open(results["container"] / report.PAGE, dark=dark)
        seen[dark] = (browser.js(background), browser.screenshot(f"container-{'dark' if dark else 'light'}"))
    assert seen[False][0] != seen[True][0]
    assert seen[False][1] != seen[True][1]
    browser.js("document.getElementById('theme').click()")
    assert browser.js(background) == seen[False][0]
    browser.js("document.getElementById('theme').click()")
    assert browser.js(background) == seen[True][0]
    assert browser.complaints() == []


def test_the_large_one_opens_at_once(results: dict[str, Path], browser: Browser) -> None:
    times = []
    for _ in range(3):
        browser.open(results["large"] / report.PAGE)
        times.append(browser.js("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert min(times) < 1500, times  # milliseconds; about 150 on two idle cores


def test_cells_have_the_colours_of_their_errors(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    gate, up = browser.js(CELLS % 0), browser.js(CELLS % 1)
    assert "253,231,37" in up  # the worst of all, and the worst that is usual, in yellow
    assert "68,1,84" in gate | up  # the best
    assert gate.keys() & up.keys() >= {"194,84,0", "0,114,178"}  # beside the rows which codec they have
    assert gate["223,227,232"] > 1000  # the layer that is kept
    assert len(gate) > 30
    legend = browser.js("document.querySelector('.legend').textContent")
    assert WINT2 in legend
    assert WINT4 in legend
    assert TIMES not in legend
    scales = browser.js("[...document.querySelectorAll('.legend')[0].querySelectorAll('.scale')].map(s => s.textContent)")
    assert scales == [f"{WINT2}0.07660.0936", f"{WINT4}0.01070.0131"]  # of usual errors, not of the one outlier
    assert "outlier of its codec" in legend
    browser.js(
        "{ const mode = document.querySelector('select'); mode.value = 'relative'; mode.dispatchEvent(new Event('change')) }"
    )
    least, most, _ = browser.js("document.querySelector('.legend .scale').textContent").split(TIMES)
    assert 0.85 < float(least) < 1
    assert 2 < float(most) < 2.5


def test_a_cell_tells_its_name_to_mouse_and_keyboard(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    browser.js("document.querySelector('.plot').scrollIntoView()")
    browser.settle()
    x, y = browser.js(
        "(() => { const b = document.querySelector('.plot canvas').getBoundingClientRect(); return [b.right - 3, b.top + 9] })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    assert browser.js(tip).startswith("model.layers.0.mlp.experts.127.gate_proj.weightrelative error 0.0")
    browser.js("document.querySelectorAll('.plot canvas')[1].focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
    assert "model.layers.2.mlp.experts.0.up_proj.weight" in browser.js(tip)
    browser.press("Escape")
    assert browser.js(tip) == ""


def test_tensors_are_sorted_filtered_and_shown_by_the_hundred(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    head = "document.querySelectorAll('#tensor-table th')[%d].%s"
    errors = browser.js(ERRORS)
    assert browser.js(NAMES)[0] == "model.layers.31.mlp.experts.77.up_proj.weight"
    assert (len(errors), errors) == (100, sorted(errors, reverse=True))
    assert browser.js("document.getElementById('matches').textContent") == "100 of 20,568 tensors"
    browser.js("document.getElementById('more').click()")
    assert len(browser.js(NAMES)) == 200
    browser.js(head % (1, "firstChild.click()"))
    errors = browser.js(ERRORS)
    assert errors == sorted(errors)
    assert browser.js(head % (1, "ariaSort")) == "ascending"
    browser.js(head % (0, "firstChild.click()"))
    assert browser.js(NAMES)[:3] == [f"model.layers.0.mlp.experts.0.{x}_proj.weight" for x in ("down", "gate", "up")]
    assert browser.js(head % (1, "ariaSort")) is None
    filtered = "{ const f = document.getElementById('filter'); f.value = '%s'; f.dispatchEvent(new Event('input')) }"
    browser.js(filtered % "layers.9. experts.3. GATE")
    assert browser.js(NAMES) == ["model.layers.9.mlp.experts.3.gate_proj.weight"]
    assert browser.js("document.getElementById('matches').textContent") == "1 tensor"
    assert browser.js("document.getElementById('more').hidden")
    browser.js(filtered % "embed")
    assert browser.js(NAMES) == []
    browser.js("document.getElementById('kept').click()")
    assert browser.js(NAMES) == ["model.embed_tokens.weight"]
    assert browser.complaints() == []


@pytest.mark.parametrize("place", ["roles", "layer-table"])
def test_the_other_tables_are_sorted_too(place: str, results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    column = browser.js(f"[...document.querySelectorAll('#{place} th')].findIndex(h => h.textContent === 'tensors')")
    counts = (
        f"[...document.querySelectorAll('#{place} tbody tr')].map(r => Number(r.cells[{column}].textContent.replace(',', '')))"
    )
    click = f"document.querySelectorAll('#{place} th')[{column}].firstChild.click()"
    browser.js(click)
    descending = browser.js(counts)
    browser.js(click)
    assert descending == sorted(descending, reverse=True)
    assert browser.js(counts) == sorted(descending)


def test_strangers_words_stay_words(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["hostile"] / report.PAGE)
    assert browser.js("window.pwned") is None
    assert browser.js("document.images.length + document.querySelectorAll('[onload], [onerror]').length") == 0
    assert browser.js("document.scripts.length") == 2
    shown = browser.js(NAMES)
    assert set(HOSTILE) - {HOSTILE[6]} < set(shown)
    assert "model.layers.0.\\u202egnp.weight" in shown  # what turns letters around is written out
    assert browser.js("document.getElementById('made').textContent").endswith(f"recipe {HOSTILE[0]} · for {HOSTILE[1]}")
    assert browser.js("document.querySelectorAll('#notes li').length") == len(HOSTILE)
