"""report.html: the numbers of the report, in half a megabyte, and never a stranger's markup."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ernie_quant.cli.main import group
from helpers.pages import EXPERTS, LAYERS, WINT4, data_of, folder_of, over_results, row, text_of

from ernie_quant.check import verify
from ernie_quant.errors import ErnieQuantError, OutputError
from ernie_quant.reporting import curve_page, page, saved
from ernie_quant.reporting import rows as report
from ernie_quant.reporting.place import Place

# --- the file --------------------------------------------------------------------------------------------------------


@over_results
def test_the_page_holds_every_tensor_of_the_report(name: str, results: dict[str, Path]) -> None:
    data, rows = data_of(text_of(results[name])), saved.read(results[name]).rows
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
    place = Place.of("ernie.layers.3.mlp.experts.7.up_gate_proj.weight")
    assert place.parts == ("ernie.layers.", ".mlp.experts.", ".up_gate_proj.weight")
    assert (place.ids, place.layer, place.expert, place.block, place.projection) == ((3, 7), 0, 1, "layer", "up_gate_proj")
    place = Place.of("model.mtp_block.0.self_attn.q_proj.weight")
    assert (place.ids, place.layer, place.expert, place.block, place.projection) == ((0,), 0, None, "MTP", "self_attn.q_proj")
    assert Place.of("vision_model.blocks.3.norm1.bias").layer is None
    assert Place.of("model.layers.007.x").ids == ()  # or the name could not be put together again


def test_54_layers_of_128_experts_take_half_a_megabyte(results: dict[str, Path]) -> None:
    assert len(saved.read(results["large"]).rows) > LAYERS * EXPERTS * 3
    assert (results["large"] / report.PAGE).stat().st_size < 700_000


def test_the_same_report_gives_the_same_bytes(results: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(results["vl"], tmp_path / "vl")
    assert page.render(saved.read(tmp_path / "vl")) == page.render(saved.read(results["vl"]))


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
    assert {p.name for p in page.PAGES.glob("*.js")} == {*page.SCRIPTS, *page.OF_TWO, *curve_page.SCRIPTS}


def test_a_folder_without_a_result_is_refused(results: dict[str, Path], tmp_path: Path) -> None:
    for missing in ("report.json", "ernie-quant.json"):
        out = Path(shutil.copytree(results["dense"], tmp_path / missing))
        (out / missing).unlink()
        with pytest.raises(OutputError, match=f"has no {missing}; a report is made from the folder of a finished result"):
            saved.read(out)
    with pytest.raises(OutputError, match=r"nowhere: has no ernie-quant\.json"):
        saved.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3}, {"role": None}, {"codec": ["x"]}, {"shape": [4, "4"]}, {"shape": 5}, {"shape": [2**40, 2**40]},
        {"bytes": -1}, {"bytes": True}, {"rel_error": "0"}, {"rel_error": 1e300}, {"squared_norm": -1.0},
        {"bits_per_weight": None}, {"sqnr_db": "=1"}, {"sqnr_db": True}, {"crc32": 7}, {"sources": [7]},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_other_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [row("a.weight", "mlp", WINT4, (4, 4), 4, 0.1)] * 2)
    report = json.loads((out / "report.json").read_text())
    report["tensors"][1] |= change
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(OutputError, match=r"report\.json: tensor 2 is not as a run writes it: "):
        saved.read(out)


@pytest.mark.parametrize("tensors", [None, [], {}, [3], ["x"], [[]], [{}]], ids=str)
def test_a_report_without_rows_is_refused(tensors: Any, tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [])
    (out / "report.json").write_text(json.dumps({"tensors": tensors}))
    with pytest.raises(OutputError):
        saved.read(out)


def test_facts_of_any_type_are_shown_or_left_out(tmp_path: Path) -> None:
    out = folder_of(tmp_path / "out", [row("x", "mlp", WINT4, (4, 4), 4, 0.0)], notes={"a": 1}, recipe=7)
    for value in ([], {"source": 3, "recipe": [1]}, {"recipe": {"rules": 3}, "source": {"files": [1]}, "source_name": {}}):
        if isinstance(value, dict):
            (out / "ernie-quant.json").write_text(json.dumps(value))
        facts = data_of(page.render(saved.read(out)).decode())["facts"]
        assert (facts["notes"], facts["recipe"], facts["error"]) == ([], "", 0)


WITHOUT_TORCH = """
import sys
from pathlib import Path

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numba", "numpy", "scipy", "transformers", "safetensors"):
            raise ImportError(f"a report needs no {name}")

sys.meta_path.insert(0, Refuses())
from ernie_quant.cli.main import group
out, other, folder = sys.argv[1:]
group(["report", out, "--out", f"{folder}/page.html", "--csv", f"{folder}/rows.csv", "--quiet"], standalone_mode=False)
group(["report", out, "--against", other, "--out", f"{folder}/two.html", "--quiet"], standalone_mode=False)
"""


def test_no_heavy_package_is_needed(results: dict[str, Path], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, results["moe"], results["moe_mtp"], tmp_path], check=True)
    assert (tmp_path / "page.html").read_bytes() == (results["moe"] / report.PAGE).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "rows.csv", "two.html"]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "vl", "container", "hostile"])
def test_pictures_for_the_model_card(name: str, results: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ernie_quant.reporting.plots import write_plots

    first, second = (write_plots(saved.read(results[name]), tmp_path / n / "plots") for n in ("1", "2"))
    assert [w.path.name for w in first] == ["error-heatmap.png", "error-histogram.png", "bytes-by-role.png"]
    for a, b in zip(first, second, strict=True):
        data = a.path.read_bytes()
        assert data == b.path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 5_000 < len(data) == a.bytes < 300_000
        assert b"Software" not in data


def test_a_converted_result_has_a_picture_of_its_bytes_only(results: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ernie_quant.reporting.plots import write_plots

    assert [w.path.name for w in write_plots(saved.read(results["converted"]), tmp_path)] == ["bytes-by-role.png"]


def test_without_matplotlib_the_error_says_what_to_install(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_quant.reporting.plots import write_plots

    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ErnieQuantError, match=r"--plots needs matplotlib: pip install 'matplotlib>="):
        write_plots(saved.read(results["dense"]), tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    """As a part of the program: alone, the command would have another --help from then on, which docs/cli.md has not."""
    return CliRunner().invoke(group, ["report", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_the_page_beside_the_weights(results: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(results["moe"], tmp_path / "out"))
    (out / report.PAGE).unlink()
    assert run(out).output == f"{out / 'report.html'}: 0.07 MB\n"
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
