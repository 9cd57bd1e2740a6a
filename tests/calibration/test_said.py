"""What a calibrated result says of itself: on the terminal, in report.json, in its card; and what others do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.calibrated import TOKENS, calibrated, worded
from helpers.disk import no_waiting
from helpers.models import invoke, random_model
from helpers.ranks import WIDTHS
from helpers.words import byte_tokenizer

from ernie_quant.reporting import calibration
from ernie_quant.reporting.rows import TensorReport, output_error, to_json
from ernie_quant.reporting.tables import tables
from ernie_quant.result import card
from ernie_quant.result.manifest import read_manifest
from ernie_quant.runtimes import Place


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    with no_waiting():
        return calibrated(
            worded(folder / "src", "moe_mtp"), folder / "out", "--experts-only", "--mtp", "--group-size", 32, "--fit"
        )


def row(name: str, shape: tuple[int, ...], of_output: float | None, role: str = "experts") -> TensorReport:
    return TensorReport(name, role, "int4", shape, 8, 4.0, 0.01, 20.0, 0.1, 0.01, 1.0, (name,), "0" * 8, output_error=of_output)


def test_the_mean_counts_weights() -> None:
    """(0.1 * 12 + 0.4 * 4) / 16; what text did not reach does not count."""
    rows = [row("a", (4, 3), 0.1), row("b", (2, 2), 0.4), row("c", (100, 100), None)]
    assert output_error(rows) == pytest.approx(0.175)
    assert output_error(rows[2:]) is None


def test_report_json_has_it_where_there_is_one() -> None:
    rows = [row("a", (4, 3), 0.1), row("b", (2, 2), None, "mtp")]
    roles = json.loads(to_json(rows, {}))["roles"]
    assert roles["experts"]["output_error"] == pytest.approx(0.1)
    assert "output_error" not in roles["mtp"]


def test_tables_have_a_column_of_it_and_of_drift() -> None:
    rows = [row("model.layers.0.a.weight", (4, 3), 0.5), row("model.layers.1.b.weight", (2, 2), None)]
    text = tables(rows, {0: 0.25, 1: 0.75})
    assert [line.split()[-2:] for line in text.splitlines() if line.startswith("layer ")] == [
        ["error", "drift"], ["0.50000", "0.25000"], ["-", "0.75000"]
    ]  # fmt: skip
    assert text.endswith("Drift of the hidden states after each layer: 0: 0.25000, 1: 0.75000")


def test_without_a_text_nothing_is_said() -> None:
    text = tables([row("model.layers.0.a.weight", (4, 3), None)])
    assert "output" not in text
    assert "drift" not in text.lower()


def test_the_card_names_text_method_and_what_was_fitted(out: Path) -> None:
    text = (out / "README.md").read_text()
    digest = next(iter(json.loads((out / "report.json").read_text())["calibration"]["sha256"].values()))
    how = f"book.txt, {TOKENS} tokens to fit to and {TOKENS} to judge by (method nearest; seed 0, windows of 512)."
    assert "## Calibration\n\nQuantized layer after layer, each fitted to what the quantized layers before it give" in text
    assert f" for a text: {how}" in text
    assert f"- sha256 of book.txt: {digest}" in text
    fitted = "- 1 weight that is kept is not the source's, but was fitted to the text, beside codes: "
    assert f"{fitted}model.layers.*.self_attn.o_proj.weight (1)" in text
    assert "- the MTP block: 7 weights are quantized data-free: no text runs through it" in text


def test_the_card_follows_from_manifest_and_report(out: Path) -> None:
    """As `publish` writes it again under another name."""
    rows = [TensorReport.from_json(r) for r in json.loads((out / "report.json").read_text())["tensors"]]
    again = card.readme(read_manifest(out), json.loads((out / "config.json").read_text()), rows, Place(out.name))
    assert again == (out / "README.md").read_text()


def test_experts_with_few_tokens_are_named() -> None:
    layers = [
        {"layer": 0, "drift": 0.0},
        {"layer": 1, "expert_tokens": [64, 63, 0]},
        {"layer": 2, "expert_tokens": [5, 500, 500]},
    ]
    assert calibration.notes({"layers": layers}) == [
        "3 of 6 experts had fewer than 64 tokens of the text, and were shown inputs of other tokens: layer 1: 1, 2; layer 2: 0"
    ]
    assert calibration.notes({"layers": layers[:1]}) == []


@pytest.mark.parametrize("said", [None, 3, {"layers": 1}, {"layers": [3, {"layer": "x"}, {"layer": 1, "expert_tokens": ["a"]}]}])
def test_what_no_run_writes_says_nothing(said: object) -> None:
    assert calibration.drift_of(said) == {}
    assert calibration.tokens_of_experts(said) == {}
    assert calibration.notes(said) == []


def test_ranks_say_it_too(tmp_path: Path) -> None:
    """The container of FastDeploy, quantized once and shared."""
    narrow = {"intermediate_size": 256, "moe_intermediate_size": 256, "vocab_size": 256, "moe_num_experts": 4}
    source = byte_tokenizer(random_model(tmp_path / "src", "paddle", "moe_mtp", **WIDTHS | narrow))
    with no_waiting():
        calibrated(source, tmp_path / "out", "--tp", 2, "--wint4-layers", 2, "--effort", 1, command="wint2")
    said = json.loads((tmp_path / "out/report.json").read_text())["calibration"]
    assert (said["name"], said["tokens"]) == ("book.txt", TOKENS)
    assert "## Calibration\n\n" in (tmp_path / "out/README.md").read_text()
    text = invoke("verify", tmp_path / "out", "--against", source, "--full")
    assert "error recomputed" in text


def test_no_place_of_this_machine_is_said(out: Path) -> None:
    for file in ("report.json", "ernie-quant.json", "README.md"):
        assert str(out.parent) not in (out / file).read_text()
