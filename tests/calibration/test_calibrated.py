"""Weights that text has been run through: what changes, what does not, and what a stop changes about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ernie_quant.calibration.evaluate import evaluate, pair
from ernie_quant.calibration.streams import between, weights_of
from ernie_quant.calibration.windows import hashes
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import GOLDEN, random_model, tensors
from helpers.runs import OF_128S
from helpers.words import byte_tokenizer

from ernie_quant.check.verify import verify
from ernie_quant.errors import AnotherPlanError
from ernie_quant.planning import built_in
from ernie_quant.planning.calibration import Calibration
from ernie_quant.planning.fitting import by_layer
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import with_method
from ernie_quant.planning.steps import Plan
from ernie_quant.result.folder import OutputFolder
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

TOKENS = 1024


@pytest.fixture(autouse=True)
def _at_once() -> Any:
    with no_waiting():
        yield


def planned(
    source: Path, text: Path, *, fit: bool = False, tokens: int = TOKENS, experts_only: bool = True, **options: Any
) -> Plan:
    made = built_in.make("wint4", "vllm", group_size=32, experts_only=experts_only)
    calibration = Calibration((text,), hashes((text,)), TOKENS, fit=fit)
    rules = with_method(made.recipe, "descent")
    return make_plan(open_source(source), runtime=made.runtime, recipe=rules, calibration=calibration)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def rows(folder: Path) -> Mapping[str, Any]:
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["tensors"]}


@pytest.fixture(scope="module")
def calibrated(model: Path, book: Path) -> Path:
    out = model.with_name("calibrated")
    with no_waiting():
        run_plan(planned(model, book), out)
    return out


@pytest.fixture(scope="module")
def fitted(model: Path, book: Path) -> Path:
    out = model.with_name("fitted")
    with no_waiting():
        run_plan(planned(model, book, fit=True), out)
    return out


def test_only_what_is_quantized_changes(model: Path, quantized: Path, calibrated: Path) -> None:
    data_free, ours = tensors(quantized), tensors(calibrated)
    assert data_free.keys() == ours.keys()
    different = {name for name in ours if not torch.equal(ours[name], data_free[name])}
    assert different
    assert all(".experts." in name for name in different)
    assert {name for name in ours if name.endswith("_packed")} <= different


def test_fit_changes_o_proj_and_the_shared_down_proj_of_layers_with_quantized_weights(
    model: Path, calibrated: Path, fitted: Path
) -> None:
    plain, ours = tensors(model), tensors(fitted)
    kept = {name for name in ours if name in plain and not torch.equal(ours[name], plain[name])}
    assert kept
    assert all(name.endswith(("self_attn.o_proj.weight", "shared_experts.down_proj.weight")) for name in kept)
    assert {name for name, row in rows(fitted).items() if row["codec"] == "kept, fitted"} == kept
    assert not [row for row in rows(calibrated).values() if row["codec"] == "kept, fitted"]


@pytest.mark.parametrize("which", ["calibrated", "fitted"])
def test_the_result_verifies(which: str, model: Path, request: pytest.FixtureRequest) -> None:
    verify(request.getfixturevalue(which), model)


def test_rows_say_what_was_measured(calibrated: Path) -> None:
    for name, row in rows(calibrated).items():
        if ".experts." in name:
            assert 0 < row["output_error"] < row["rel_error"], name
            assert row["codec"] == "int4, group 32, mse, descent"
        else:
            assert "output_error" not in row
    said = json.loads((calibrated / "report.json").read_text())["calibration"]
    assert said["tokens"] == TOKENS
    sparse = [layer for layer in said["layers"] if "expert_tokens" in layer]
    assert sparse
    assert all(layer["drift"] > 0 for layer in sparse)


def test_it_answers_nearer_to_its_source(model: Path, quantized: Path, calibrated: Path, fitted: Path, book: Path) -> None:
    """On the text that it was fitted to; the weights are random, so that nothing is learned for another."""
    before, after, more = (evaluate(pair(out, model), [book], 1022) for out in (quantized, calibrated, fitted))
    assert after.rows[0].kl.value < 0.7 * before.rows[0].kl.value
    assert more.rows[0].kl.value < after.rows[0].kl.value


class Stopped(Exception):
    """By us."""


@pytest.mark.parametrize("moves", [1, 7, 30])
def test_a_stopped_run_goes_on_and_has_the_same_bytes(
    moves: int, model: Path, book: Path, calibrated: Path, tmp_path: Path
) -> None:
    seen: list[str] = []

    def watch(part: float, what: str) -> None:
        seen.append(what)
        assert 0 <= part <= 1
        if len(seen) == moves:
            raise Stopped

    out = tmp_path / calibrated.name
    with pytest.raises(Stopped):
        run_plan(planned(model, book), out, watch=watch)
    again: list[str] = []
    run_plan(planned(model, book), out, watch=lambda _, what: again.append(what))
    assert files(out) == files(calibrated)
    if moves == 30:
        assert again[0] != seen[0]  # what was finished is not done again
    assert not (out / ".ernie-quant").exists()


def test_restart_drops_what_was_calibrated(model: Path, book: Path, calibrated: Path, tmp_path: Path) -> None:
    def stop(_: float, what: str) -> None:
        if what.startswith("layer 3"):
            raise Stopped

    out, again = tmp_path / calibrated.name, list[str]()
    with pytest.raises(Stopped):
        run_plan(planned(model, book, fit=True), out, watch=stop)
    run_plan(planned(model, book), out, restart=True, watch=lambda _, what: again.append(what))
    assert again[0].startswith("layer 2")
    assert files(out) == files(calibrated)


def test_what_is_calibrated_already_needs_no_room_again(model: Path, book: Path, tmp_path: Path) -> None:
    def stop(_: float, what: str) -> None:
        if what.startswith("layer 3"):
            raise Stopped

    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run_plan(planned(model, book), out, watch=stop)
    there = sum(path.stat().st_size for path in (out / ".ernie-quant/calibration").iterdir())
    assert OutputFolder(out)._given_back() == there > 0


def test_the_number_of_threads_does_not_matter(model: Path, book: Path, calibrated: Path, tmp_path: Path) -> None:
    out = tmp_path / calibrated.name
    run_plan(planned(model, book), out, workers=5)
    assert files(out) == files(calibrated)


def test_the_layout_of_the_source_does_not_matter(model: Path, book: Path, tmp_path: Path) -> None:
    from ernie_quant.planning.recipe import KEEP_ALL

    paddle = tmp_path / "paddle"
    run_plan(make_plan(open_source(model), runtime="fastdeploy", recipe=KEEP_ALL), paddle)
    one, other = tmp_path / "one", tmp_path / "other"
    run_plan(planned(model, book, fit=True), one)
    run_plan(planned(paddle, book, fit=True), other)
    ours, theirs = tensors(one), tensors(other)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_every_linear_can_be_tuned(model: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_plan(planned(model, book, experts_only=False), out)
    said = rows(out)
    tuned = [name for name, row in said.items() if "output_error" in row]
    assert {name.split(".")[-2] for name in tuned} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    verify(out, model)


def test_another_tokenizer_does_not_go_on_with_what_was_begun(model: Path, book: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)

    def stop(_: float, what: str) -> None:
        if what.startswith("layer 2"):
            raise Stopped

    with pytest.raises(Stopped):
        run_plan(planned(source, book), out, watch=stop)
    table = json.loads((source / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (source / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(AnotherPlanError, match="begun on other tokens"):
        run_plan(planned(source, book), out)


def test_another_text_is_another_plan(model: Path, book: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(book.read_text().replace("odd", "old"))
    assert planned(model, book).identity != planned(model, other).identity
    moved = tmp_path / book.name
    shutil.copy(book, moved)
    assert planned(model, book).identity == planned(model, moved).identity


def test_layers_that_nobody_changes_are_passed_and_the_last_ones_not_even_that(model: Path, book: Path) -> None:
    plan = planned(model, book)
    assert all(not step.kept for steps in by_layer(plan, fit=False).values() for step in steps)
    one = replace(plan, shards=tuple(replace(s, steps=tuple(x for x in s.steps if ".layers.1." in x.name)) for s in plan.shards))
    assert list(by_layer(one, fit=False)) == [1]


def test_from_the_command_line(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    asked = ("--experts-only", "--group-size", 32, "--calibration", book, "--calibration-tokens", TOKENS)
    assert command("wint4", model, out, *asked)[0] == 0
    assert any("output_error" in row for row in rows(out).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fit",), "--fit fits weights to text: name some"),
        (("--calibration", "auto", "--calibration", "BOOK"), "--calibration auto stands alone"),
        (("--calibration", "nowhere.txt"), "nowhere.txt: cannot be read: No such file or directory"),
        (("--calibration", "BOOK", "--calibration-tokens", "1000000"), "ask for fewer"),
    ],
)
def test_what_cannot_be_done_is_said(
    options: tuple[str, ...], words: str, model: Path, book: Path, tmp_path: Path, command: Command
) -> None:
    asked = [str(book) if option == "BOOK" else option for option in options]
    code, _, err = command("wint4", model, tmp_path / "out", "--experts-only", "--group-size", 32, *asked)
    assert code in (1, 2)
    assert words in err


def test_a_model_without_a_tokenizer(book: Path, tmp_path: Path, command: Command) -> None:
    code, _, err = command("wint4", GOLDEN / "moe_hf/pt", tmp_path / "out", "--group-size", 32, "--calibration", book)
    assert code == 1
    assert "has no tokenizer (looked for tokenizer.json, tokenizer.model)" in err


def test_in_a_container_eight_bits_round_unless_they_may_be_fitted(book: Path, tmp_path: Path) -> None:
    source = byte_tokenizer(random_model(tmp_path / "source", "paddle", **OF_128S | {"vocab_size": 256, "moe_k": 2}))
    for name, fit in (("out", False), ("fitted", True)):
        made = built_in.make("wint2", "fastdeploy", wint4_layers=0)
        text = Calibration((book,), hashes((book,)), TOKENS, fit=fit)
        rules = with_method(made.recipe, "descent")
        plan = make_plan(open_source(source), runtime="fastdeploy", recipe=rules, calibration=text, unsupported=True)
        run_plan(plan, tmp_path / name)
        eight = [row for row in rows(tmp_path / name).values() if row["codec"].startswith("int8") and "output_error" in row]
        two = [row for row in rows(tmp_path / name).values() if row["codec"].startswith("wint2")]
        assert two
        assert all("output_error" in row for row in two)
        assert any(row.get("fitted") for row in two)
        assert any(row.get("fitted") for row in eight) is fit
        verify(tmp_path / name, source)


def test_a_token_that_a_layer_makes_large_counts_between_before_and_after() -> None:
    before, after = weights_of(torch.tensor([[1.0, 1.0], [1.0, 1.0]])), weights_of(torch.tensor([[2.0, 0.0], [1000.0, 0.0]]))
    assert torch.allclose(between(before, after), torch.tensor([2**-0.5, (2e-6) ** 0.5]))
    assert torch.equal(between(after, before), after)
