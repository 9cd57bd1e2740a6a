"""report.html: the numbers of the report, in half a megabyte, in a real browser, and never a stranger's markup.

The browser is a headless Chromium, driven through its debugging pipe; without one on the machine those tests are skipped.
PAGE_SCREENSHOTS=folder keeps the pictures that the tests take, to be looked at.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import html
import itertools
import json
import math
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ernie_quant.cli.report import command
from helpers.models import GOLDEN, random_model, write

from ernie_quant import codecs
from ernie_quant.check import verify
from ernie_quant.errors import ErnieQuantError, OutputError
from ernie_quant.plan import built_in
from ernie_quant.report import page
from ernie_quant.report import rows as report
from ernie_quant.report.rows import TensorReport, to_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAYERS, EXPERTS, MIXED = 54, 128, 7
TIMES = "\u00d7"
WINT2, WINT4, WINT8, KEPT = "wint2 (CCQ)", "int4 (-7 to 7), per channel, mse", "int8 (-127 to 127), per channel, mse", "kept"
HOSTILE = [
    "</script><img src=x onerror=window.pwned=1>",
    "model.layers.0.<script>window.pwned=1</script>.weight",
    "<!--<script>",
    '"><svg onload=window.pwned=1>',
    "{{script}}{{data}}",
    "&lt;b&gt;.$\\frac{1}{2}$",
    "model.layers.0.\u202egnp.weight",
    "__proto__.constructor",
]


# --- reports ---------------------------------------------------------------------------------------------------------


def row(name: str, role: str, codec: str, shape: tuple[int, ...], bits: float, error: float) -> TensorReport:
    weights = math.prod(shape)
    decibels = -10 * math.log10(error) if error else None
    norm = 4e-4 * weights
    return TensorReport(
        name, role, codec, shape, int(weights * bits / 8), bits, error, decibels, error / 7, error * norm, norm, (name,), "0" * 8
    )


def large() -> list[TensorReport]:
    """54 layers of 128 experts: WINT4 in the first 7 layers, WINT2 after, the last as it was; one expert is by far the worst."""
    rows = [row("model.embed_tokens.weight", "embeddings", KEPT, (103424, 8192), 16, 0)]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}"
        rows += [
            row(f"{p}.self_attn.{x}_proj.weight", "attention", WINT8, (8192, 8192), 8.004, 5e-5 + 1e-7 * layer) for x in "qkvo"
        ]
        rows.append(row(f"{p}.input_layernorm.weight", "norms", KEPT, (8192,), 16, 0))
        codec, bits, least = (WINT4, 4.009, 0.0119) if layer < MIXED else (WINT2, 2.38, 0.0851)
        for expert, (i, x) in itertools.product(range(EXPERTS), enumerate(("down", "gate", "up"))):
            error = least * (1 + 0.1 * math.sin(37.1 * layer + 11.3 * expert + i))
            error *= 2.5 if (layer, expert, x) == (31, 77, "up") else 1
            if layer == LAYERS - 1:
                codec, bits, error = KEPT, 16, 0.0
            rows.append(row(f"{p}.mlp.experts.{expert}.{x}_proj.weight", "experts", codec, (3584, 8192), bits, error))
    return rows


def folder_of(out: Path, rows: list[TensorReport], **header: Any) -> Path:
    """As much of a finished result as the page reads."""
    out.mkdir(parents=True)
    (out / "report.json").write_text(to_json(rows, {"recipe": "wint2", "runtime": "fastdeploy", "notes": [], **header}))
    source = {"revision": "main", "files": {"model.safetensors": {"bytes": 10**12, "header": "0"}, "LICENSE": {"bytes": 7}}}
    (out / "ernie-quant.json").write_text(json.dumps({"source_name": "ERNIE", "version": "1", "source": source, "files": {}}))
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of results, each with its page."""
    base = tmp_path_factory.mktemp("results")
    codec = codecs.make("rtn", {"bits": 4, "group_size": "channel", "scale": "mse"})
    wint4 = built_in.one_codec("wint4", codec, experts_only=False, mtp=True, keep_unfit=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        for family in ("dense", "moe", "moe_mtp", "vl"):
            write(GOLDEN / family / "paddle", base / family, recipe=wint4)
        write(GOLDEN / "moe/paddle", base / "converted")
        random_model(
            base / "src", "paddle", "moe_mtp", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
            moe_num_experts=4,
        )  # fmt: skip
        write(base / "src", base / "container", "fastdeploy", recipe=built_in.fastdeploy_container("wint2", 2, effort=1))
        folder_of(base / "large", large(), notes=["FD_USE_MACHETE=0 is needed"])
        rows = [row(name, name, name, (64, 64), 4.5, 0.01 + i / 1000) for i, name in enumerate(HOSTILE)]
        folder_of(base / "hostile", rows, recipe=HOSTILE[0], runtime=HOSTILE[1], notes=HOSTILE)
        found = {p.name: p for p in base.iterdir() if p.name != "src"}
        for out in found.values():
            page.write(page.read(out), out / report.PAGE)
    return found


RESULTS = ("dense", "moe", "moe_mtp", "vl", "converted", "container", "large", "hostile")
over_results = pytest.mark.parametrize("name", RESULTS)


def text_of(out: Path) -> str:
    return (out / report.PAGE).read_text()


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    value: dict[str, Any] = json.loads(found)
    return value


# --- the file --------------------------------------------------------------------------------------------------------


@over_results
def test_the_page_holds_every_tensor_of_the_report(name: str, results: dict[str, Path]) -> None:
    data, rows = data_of(text_of(results[name])), page.read(results[name]).rows
    found = {}
    for s in data["series"]:
        for k in range(s["n"]):
            ids = [str(column[k]) for column in s["ids"]]
            full = "".join(itertools.chain.from_iterable(itertools.zip_longest(s["parts"], ids, fillvalue="")))
            error = s["error"][k] if "error" in s else 0
            found[full] = (data["roles"][s["role"]], data["codecs"][s["codec"]], s["bytes"], tuple(s["shape"]), error)
    assert len(found) == len(rows) == data["facts"]["tensors"]
    if name != "hostile":  # whose names are escaped
        assert found.keys() == {r.name for r in rows}
        for r in rows:
            assert found[r.name][:4] == (r.role, r.codec, r.bytes, r.shape)
            assert found[r.name][4] == pytest.approx(r.rel_error, rel=1e-3)
    assert sum(r["bytes"] for r in data["by_role"]) == sum(r["bytes"] for r in data["by_layer"]) == data["facts"]["bytes"]


def test_names_are_taken_apart() -> None:
    place = page.Place.of("ernie.layers.3.mlp.experts.7.up_gate_proj.weight")
    assert place.parts == ("ernie.layers.", ".mlp.experts.", ".up_gate_proj.weight")
    assert (place.ids, place.layer, place.expert, place.block, place.projection) == ((3, 7), 0, 1, "layer", "up_gate_proj")
    place = page.Place.of("model.mtp_block.0.self_attn.q_proj.weight")
    assert (place.ids, place.layer, place.expert, place.block, place.projection) == ((0,), 0, None, "MTP", "self_attn.q_proj")
    assert page.Place.of("vision_model.blocks.3.norm1.bias").layer is None
    assert page.Place.of("model.layers.007.x").ids == ()  # or the name could not be put together again


def test_54_layers_of_128_experts_take_half_a_megabyte(results: dict[str, Path]) -> None:
    assert len(page.read(results["large"]).rows) > LAYERS * EXPERTS * 3
    assert (results["large"] / report.PAGE).stat().st_size < 700_000


def test_the_same_report_gives_the_same_bytes(results: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(results["vl"], tmp_path / "vl")
    assert page.render(page.read(tmp_path / "vl")) == page.render(page.read(results["vl"]))


@over_results
def test_the_page_is_one_file_whose_policy_allows_no_address(name: str, results: dict[str, Path]) -> None:
    text = text_of(results[name])
    data = text[text.index('<script id="data"') :]
    assert set(re.findall(r"https?://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (style,), scripts = (
        re.findall(r"<style>(.*?)</style>", text, re.DOTALL),
        re.findall(r"<script>(.*?)</script>", text, re.DOTALL),
    )
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (style, *scripts)]
    assert html.unescape(policy) == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}';"
        " base-uri 'none'; form-action 'none'"
    )
    assert len(scripts) == 1
    assert not set("<>&") & set(data[data.index(">") + 1 : data.index("</script>")])


def test_scripts_make_no_markup() -> None:
    code = "\n".join(p.read_text() for p in page.PAGES.glob("*.js"))
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|\bfetch\b|XMLHttpRequest|import\("
    assert re.findall(forbidden, code) == []
    assert {p.name for p in page.PAGES.glob("*.js")} == set(page.SCRIPTS)


def test_a_folder_without_a_result_is_refused(results: dict[str, Path], tmp_path: Path) -> None:
    for missing in ("report.json", "ernie-quant.json"):
        out = Path(shutil.copytree(results["dense"], tmp_path / missing))
        (out / missing).unlink()
        with pytest.raises(OutputError, match=f"has no {missing}; a report is made from the folder of a finished result"):
            page.read(out)
    with pytest.raises(OutputError, match=r"nowhere: has no ernie-quant\.json"):
        page.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3}, {"role": None}, {"codec": ["x"]}, {"shape": [4, "4"]}, {"shape": 5}, {"shape": [2**40, 2**40]},
        {"bytes": -1}, {"bytes": True}, {"rel_error": "0"}, {"rel_error": 1e300}, {"squared_norm": -1.0},
        {"bits_per_weight": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [row("a.weight", "mlp", WINT4, (4, 4), 4, 0.1)] * 2)
    report = json.loads((out / "report.json").read_text())
    report["tensors"][1] |= change
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(OutputError, match=r"report\.json: tensor 2 is not as a run writes it: "):
        page.read(out)


@pytest.mark.parametrize("tensors", [None, [], {}, [3], ["x"], [[]], [{}]], ids=str)
def test_a_report_without_rows_is_refused(tensors: Any, tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [])
    (out / "report.json").write_text(json.dumps({"tensors": tensors}))
    with pytest.raises(OutputError):
        page.read(out)


def test_facts_of_any_type_are_shown_or_left_out(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [row("x", "mlp", WINT4, (4, 4), 4, 0.0)], notes={"a": 1}, recipe=7)
    for value in ([], {"source": 3, "recipe": [1]}, {"recipe": {"rules": 3}, "source": {"files": [1]}, "source_name": {}}):
        if isinstance(value, dict):
            (out / "ernie-quant.json").write_text(json.dumps(value))
        facts = data_of(page.render(page.read(out)).decode())["facts"]
        assert (facts["notes"], facts["recipe"], facts["error"]) == ([], "", 0)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "vl", "container", "hostile"])
def test_pictures_for_the_model_card(name: str, results: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ernie_quant.report.plots import write_plots

    first, second = (write_plots(page.read(results[name]), tmp_path / n / "plots") for n in ("1", "2"))
    assert [w.path.name for w in first] == ["error-heatmap.png", "error-histogram.png", "bytes-by-role.png"]
    for a, b in zip(first, second, strict=True):
        data = a.path.read_bytes()
        assert data == b.path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 5_000 < len(data) == a.bytes < 300_000
        assert b"Software" not in data


def test_a_converted_result_has_a_picture_of_its_bytes_only(results: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ernie_quant.report.plots import write_plots

    assert [w.path.name for w in write_plots(page.read(results["converted"]), tmp_path)] == ["bytes-by-role.png"]


def test_without_matplotlib_the_error_says_what_to_install(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_quant.report.plots import write_plots

    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ErnieQuantError, match=r"--plots needs matplotlib: pip install ernie-quant\[plots\]"):
        write_plots(page.read(results["dense"]), tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command_writes_the_page_beside_the_weights(results: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(results["moe"], tmp_path / "out"))
    (out / report.PAGE).unlink()
    assert run(out).output == f"{out / 'report.html'}: 0.05 MB\n"
    assert (out / report.PAGE).read_text().startswith("<!DOCTYPE html>")
    verify.verify(out)  # which is not disturbed by it
    assert run(out, "--quiet").output == ""
    size = (out / report.PAGE).stat().st_size
    assert json.loads(run(out, "--json").output) == {"status": "done", "files": {str(out / "report.html"): size}}


def test_the_command_writes_elsewhere_too(results: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = run(results["dense"], "--out", tmp_path / "page.html", "--plots").output.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(tmp_path / path)
        for path in ("page.html", "plots/error-heatmap.png", "plots/error-histogram.png", "plots/bytes-by-role.png")
    ]
    with pytest.raises(OutputError, match=r"nowhere/page.html: cannot be written: No such file or directory"):
        run(results["dense"], "--out", tmp_path / "nowhere/page.html")


# --- a real browser --------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium. It reads JSON messages from descriptor 3 and writes them to 4, each with a zero byte at its end."""

    def __init__(self, chromium: str, profile: Path) -> None:
        theirs_in, self.outgoing = map(_high, os.pipe())
        self.incoming, theirs_out = map(_high, os.pipe())
        flags = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
            "--remote-debugging-pipe", "about:blank",
        )  # fmt: skip
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        self.pid = os.posix_spawn(chromium, [chromium, *flags], os.environ, file_actions=actions)
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", {}
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        os.write(
            self.outgoing, json.dumps({"id": number, "method": method, "params": parameters, **self.session}).encode() + b"\0"
        )
        while (message := self.receive()).get("id") != number:
            pass
        assert "error" not in message, message
        found: dict[str, Any] = message["result"]
        return found

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.incoming], [], [], 60)[0], "the browser says nothing"
            data = os.read(self.incoming, 1 << 20)
            assert data, "the browser has gone"
            self.buffer += data
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, file: Path, width: int = 1280, height: int = 900, *, phone: bool = False, dark: bool = False) -> None:
        """Until all is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        scale = 2 if phone else 1
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not self.of("Page.loadEventFired"):
            self.receive()
        end = time.monotonic() + 60
        while self.js("document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < end, self.complaints()
            time.sleep(0.02)
        self.settle()

    def settle(self) -> None:
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        return [p for kind in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") for p in self.of(kind)]

    def screenshot(self, name: str) -> bytes:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            (Path(folder) / f"{name}.png").write_bytes(data)
        return data

    def press(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        self.session = {}
        self.call("Browser.close")
        os.close(self.outgoing)
        os.close(self.incoming)
        os.waitpid(self.pid, 0)


def _high(fd: int) -> int:
    """The same descriptor above those that the browser expects."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    opened = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


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
    expected = {"dense": 1, "moe": 4, "moe_mtp": 4, "vl": 7, "converted": 0, "container": 3, "large": 4, "hostile": 1}
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
    assert "253,231,37" in up  # the worst of all, in yellow
    assert "253,231,37" not in gate
    assert "68,1,84" in gate | up  # the best
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
