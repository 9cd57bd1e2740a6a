"""report.html in a real browser: it opens, fits a phone, sorts and filters, and keeps strangers' words words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers.browser import Browser
from helpers.pages import HOSTILE, TIMES, WINT2, WINT4, folder_of, over_results, row

from ernie_quant.reporting import page, saved
from ernie_quant.reporting import rows as report

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
        "gguf": 4,
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
    browser.js(
        "{ const mode = document.querySelector('select'); mode.value = 'relative'; mode.dispatchEvent(new Event('change')) }"
    )
    least, most, _ = browser.js("document.querySelector('.legend .scale').textContent").split(TIMES)
    assert 0.85 < float(least) < 1
    assert 2 < float(most) < 2.5


def test_bars_are_as_wide_as_their_bytes(results: dict[str, Path], browser: Browser) -> None:
    """Of a role with a ten millionth of the bytes too: nothing is drawn that is not there."""
    for name in ("large", "vl", "converted"):
        found = report.grouped(saved.read(results[name]).rows, lambda r: r.role)
        sums = sorted((sum(r.bytes for r in rows) for rows in found.values()), reverse=True)
        browser.open(results[name] / report.PAGE)
        whole = browser.js("document.getElementById('whole').getBoundingClientRect().width")
        assert whole > 1000
        widths = browser.js("[...document.getElementById('whole').children].map(p => p.getBoundingClientRect().width)")
        assert widths == pytest.approx([whole * n / sum(sums) for n in sums], abs=0.1)
        tracks = "[...document.querySelectorAll('#roles .track')].map(t => [t, ...t.children])"
        weights = [sum(math.prod(r.shape) for r in rows) for rows in found.values()]
        widest = max(*sums, *(2 * n for n in weights))
        for size, (track, before, stored) in zip(
            sums, browser.js(f"{tracks}.map(of => of.map(b => b.getBoundingClientRect().width))"), strict=True
        ):
            assert stored == pytest.approx(track * size / widest, abs=0.1)
            assert any(before == pytest.approx(track * 2 * n / widest, abs=0.1) for n in weights)


def test_small_parts_are_not_inflated_by_letters_or_borders(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    assert browser.js("[...document.getElementById('whole').children].map(p => p.textContent)") == ["experts 93 %", "", "", ""]
    parts = "[...document.querySelectorAll('#whole > div, .track div')]"
    keys = ("minWidth", "paddingLeft", "paddingRight", "borderLeftWidth", "borderRightWidth", "marginLeft")
    styles = ", ".join(f"getComputedStyle(part).{key}" for key in keys)
    assert set(browser.js(f"{parts}.flatMap(part => [{styles}])")) <= {"0px", "auto"}


def test_each_codec_has_a_scale_of_its_own(results: dict[str, Path], browser: Browser) -> None:
    """On one scale a codec has a few colours near an end; on its own it has them all."""
    browser.open(results["large"] / report.PAGE)
    scales = "[...document.querySelectorAll('.legend')[0].querySelectorAll('.scale')].map(s => s.textContent)"
    choose = "{ const mode = document.querySelector('select'); mode.value = '%s'; mode.dispatchEvent(new Event('change')) }"
    assert browser.js(scales) == [f"{WINT2}0.07660.0936", f"{WINT4}0.01070.0131"]  # of usual errors, not of the one outlier
    own = browser.js(CELLS % 0)
    browser.js(choose % "same")
    assert browser.js(scales) == ["0.01070.0936"]
    assert len(browser.js(CELLS % 0)) < len(own)  # one scale tells codecs apart, and little more
    browser.js(choose % "expected")
    assert browser.js(scales) == [f"0.747{TIMES}1.90{TIMES}"]


def test_an_outlier_has_a_sign_and_words(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    name = "model.layers.31.mlp.experts.77.up_proj.weight"
    first = browser.js("[...document.querySelector('#tensor-table tbody tr').cells].slice(0, 4).map(cell => cell.textContent)")
    assert first == [name, "0.195", "\u25b2 high 2.29", "1.90"]
    assert browser.js("document.getElementById('outliers').parentElement.textContent.trim()") == "outliers only (1)"
    browser.js("document.getElementById('outliers').click()")
    assert browser.js(NAMES) == [name]
    browser.js("document.getElementById('outliers').click()")
    browser.js("{ const f = document.getElementById('filter'); f.value = 'outlier'; f.dispatchEvent(new Event('input')) }")
    assert browser.js(NAMES) == [name]
    assert "outlier of its codec" in browser.js("document.querySelector('.legend').textContent")
    at = "[...document.querySelectorAll('.plot canvas')][1]"
    browser.js(f"{at}.focus()")
    for key in ["ArrowRight"] * 77 + ["ArrowDown"] * 31:
        browser.press(key)
    tip = browser.js("document.getElementById('tip').textContent")
    assert f"1.90{TIMES} that of Gaussian weights, 2.29{TIMES} the median of its codec" in tip
    assert "\u25b2 outlier: more than is usual, 0.0590 to 0.123" in tip


def test_errors_stand_beside_what_is_expected(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    lines = browser.js("[...document.querySelectorAll('#codec-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert lines[0] == [
        WINT2, "17,664", "0.102", "0.0851", "0.83", "0.0766 to 0.195", "0.0590 to 0.123", "\u25b2 high 1 ",
    ]  # fmt: skip
    assert lines[1][:5] == [WINT4, "2,688", "0.0129", "0.0119", "0.92"]
    assert browser.js("document.querySelectorAll('#histograms line.gauss').length") == 3
    assert browser.js("document.getElementById('by-text').hidden")
    browser.open(results["converted"] / report.PAGE)
    assert browser.js("document.getElementById('by-codec').hidden")
    assert browser.js("document.getElementById('outliers').parentElement.hidden")
    browser.open(results["calibrated"] / report.PAGE)
    assert browser.js("document.getElementById('by-text').hidden") is False


def test_a_single_tensor_is_a_page_too(tmp_path: Path, browser: Browser) -> None:
    out = folder_of(tmp_path / "out", [row("model.layers.0.mlp.up_proj.weight", "mlp", WINT4, (4, 64), 4, 0.01)])
    browser.open(page.write(saved.read(out), out / report.PAGE).path)
    cells = browser.js("[...document.querySelector('#codec-table tbody tr').cells].map(cell => cell.textContent)")
    assert cells == [WINT4, "1", "0.0100", "0.0100", "1.00", "0.0100", "too few to say", "\u2013"]
    assert browser.complaints() == []


@pytest.mark.parametrize("command", ["ernie-quant wint4 'my model' out --experts-only", *HOSTILE, None, 7, ["x"], "x" * 20_000])
def test_the_command_is_shown_as_it_is_told(command: object, tmp_path: Path, browser: Browser) -> None:
    out = folder_of(tmp_path / "out", [row("x", "mlp", WINT4, (4, 64), 4, 0.01)])
    manifest = json.loads((out / "ernie-quant.json").read_text()) | {
        "command": command,
        "recipe": {"name": "mine", "rules": [{"applies_to": HOSTILE[0], "codec": "int4"}], "keep_unfit": True},
        "options": {"fixes": ["a", "b"], "calibration": {"name": HOSTILE[1], "fit": False}, "copy_code": False},
        "libraries": {"torch": "2.13"},
    }
    (out / "ernie-quant.json").write_text(json.dumps(manifest))
    browser.open(page.write(saved.read(out), out / report.PAGE).path)
    shown = browser.js("document.querySelector('#recipe pre')?.textContent ?? null")
    if not isinstance(command, str):
        assert shown is None
    elif command == HOSTILE[6]:
        assert shown == "model.layers.0.\\u202egnp.weight"
    else:
        assert shown == command[:8000] + (" \u2026" if len(command) > 8000 else "")
    how = browser.js("document.getElementById('recipe').innerText")
    for words in (f"{HOSTILE[0]}: int4", "fixes a, b", f"calibration.name {HOSTILE[1]}", "keep_unfit yes", "torch 2.13"):
        assert words in how
    assert "copy_code" not in how
    assert browser.js("window.pwned") is None
    assert browser.js("document.scripts.length") == 2
    assert browser.complaints() == []


def test_an_old_manifest_says_nothing_of_rules(results: dict[str, Path], browser: Browser) -> None:
    browser.open(results["large"] / report.PAGE)
    assert browser.js("[...document.querySelectorAll('#recipe dt')].map(name => name.textContent)") == [
        "Recipe", "Runtime", "Source", "Versions",
    ]  # fmt: skip


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
