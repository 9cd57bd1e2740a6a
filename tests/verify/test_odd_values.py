"""NaN, infinity and weights of zeros: counted while they are copied, named, and what holds them is never called sound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import copy, random_model, tensors, write
from helpers.results import WIDTHS, edit, sealed
from helpers.verified import unmeasured
from safetensors.torch import save_file

from ernie_quant.check.verify import verify
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.measure import Values, means_something, values_of
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

NORM, ROUTER, EMBED = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"
EXPERT = [f"model.layers.1.mlp.experts.1.{part}_proj.weight" for part in ("down", "gate", "up")]
NAN, INFINITY = float("nan"), float("inf")


def change(folder: Path, **names: float) -> Path:
    """The first element of a tensor is another; 0: all of them."""
    table = {name: tensor.clone() for name, tensor in tensors(folder).items()}
    for name, value in names.items():
        table[name].view(-1)[slice(None) if value == 0 else 0] = value
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clean and odd: a model, and one with a NaN in a norm, infinity in the embeddings, a router and an expert of zeros."""
    folder = tmp_path_factory.mktemp("values")
    with no_waiting():
        random_model(folder / "clean", layouts.PT, "moe", **WIDTHS["moe"])
        change(copy(folder / "clean", folder / "odd"), **{NORM: NAN, EMBED: -INFINITY, ROUTER: 0}, **dict.fromkeys(EXPERT, 0))
        for name in ("clean", "odd"):
            write(folder / name, folder / f"{name}-pt")
            write(folder / name, folder / f"{name}-int4", recipe=EXPERTS)
    return folder


EXPERTS = Recipe("experts", (RecipeRule(RoundToNearest(4, 64), roles=("experts",)),))


def rows(folder: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["tensors"]}


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_values_are_counted_in_every_dtype(dtype: torch.dtype) -> None:
    assert values_of(torch.tensor([[0, -0.0], [1, 2]]).to(dtype)) == Values(0, only_zeros=False)
    assert values_of(torch.tensor([0, -0.0]).to(dtype)) == Values(0, only_zeros=True)
    assert values_of(torch.tensor([0, NAN, 1, NAN]).to(dtype)) == Values(2, only_zeros=False)
    if dtype != torch.float8_e4m3fn:  # it has none
        assert values_of(torch.tensor([-INFINITY, 0, INFINITY]).to(dtype)) == Values(2, only_zeros=False)


def test_what_is_no_number_is_not_odd() -> None:
    assert values_of(torch.zeros(3, dtype=torch.int8)) == Values(0, only_zeros=False)
    assert values_of(torch.empty(0, 4)) == Values()
    assert values_of(torch.tensor(NAN)) == Values(1, only_zeros=False)
    assert Values() + Values(2, only_zeros=False) == Values(2, only_zeros=False)


def test_zeros_are_odd_in_weights_only() -> None:
    assert all(means_something(name) for name in (NORM, ROUTER, EMBED, *EXPERT, "ernie.layers.1.mlp.gate.weight_1"))
    fine = ("model.layers.1.mlp.moe_statics.e_score_correction_bias", "vision_model.blocks.0.attn.qkv.bias", "x.weight_scale")
    assert not any(means_something(name) for name in fine)


# --- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "int4"])
def test_they_are_in_the_report_the_card_and_the_notes(kind: str, made: Path) -> None:
    out = made / f"odd-{kind}"
    odd = {n: (r.get("not_finite"), r.get("only_zeros")) for n, r in rows(out).items() if "not_finite" in r or "only_zeros" in r}
    zeros = dict.fromkeys([ROUTER, *EXPERT], (None, True))
    assert odd == {NORM: (1, None), EMBED: (1, None)} | zeros
    infinite, all_zeros = json.loads((out / "report.json").read_text())["notes"][-2:]
    numel = math.prod(rows(out)[EMBED]["shape"])  # type: ignore[arg-type]
    assert infinite == f"2 weights hold NaN or infinity: {EMBED} (1 of {numel}), {NORM} (1 of 256)"
    assert all_zeros == f"4 weights hold nothing but zeros: {', '.join([*EXPERT, ROUTER])}"
    for note in (infinite, all_zeros):
        assert f"- {note}\n" in (out / "README.md").read_text()
        assert note in json.loads((out / "ernie-quant.json").read_text())["summary"]["notes"]


@pytest.mark.parametrize("kind", ["pt", "int4"])
def test_of_a_sound_model_nothing_is_said(kind: str, made: Path) -> None:
    text = (made / f"clean-{kind}/report.json").read_text() + (made / f"clean-{kind}/README.md").read_text()
    assert "only_zeros" not in text
    assert "not_finite" not in text
    assert "zeros" not in text
    found = verify(made / f"clean-{kind}", made / "clean")
    assert (found.odd.not_finite, found.odd.only_zeros) == ({}, {})


def test_the_terminal_says_it_too(made: Path, command: Command, tmp_path: Path) -> None:
    code, text, _ = command("convert", made / "odd", tmp_path / "out", "--to", "pt")
    assert code == 0
    assert "note: 2 weights hold NaN or infinity: " in text
    code, text, _ = command("convert", made / "odd", tmp_path / "json", "--to", "pt", "--json")
    assert [note[:34] for note in json.loads(text)["notes"]][-1] == "4 weights hold nothing but zeros: "


# --- verify ------------------------------------------------------------------------------------------------------------

ALL = ", ".join([*EXPERT, ROUTER])


@pytest.mark.parametrize("kind", ["pt", "int4"])
@pytest.mark.parametrize("options", [(), ("--full",), ("--sample", 1)])
def test_what_the_report_says_is_not_called_sound(kind: str, options: tuple[object, ...], made: Path, command: Command) -> None:
    """Whether those tensors are in the sample or not."""
    code, text, _ = command("verify", made / f"odd-{kind}", *options)
    assert code == 0
    first, *lines = text.splitlines()
    assert first.startswith(f"{made / f'odd-{kind}'}: verified, but the model is not sound: ")
    assert f"  2 hold NaN or infinity, as the report says: {EMBED}, {NORM}" in lines
    assert f"  4 hold nothing but zeros, as the report says: {ALL}" in lines


def test_weights_of_zeros_alone_have_words_of_their_own(command: Command, tmp_path: Path) -> None:
    """A router of zeros may be meant so: the model of `make demo` has them."""
    folder = change(random_model(tmp_path / "src", layouts.PT, **WIDTHS["moe"]), **{ROUTER: 0.0})
    assert command("convert", folder, tmp_path / "out", "--to", "pt", "--quiet")[0] == 0
    code, text, _ = command("verify", tmp_path / "out", "--against", folder, "--full")
    first, *lines = text.splitlines()
    assert (code, first.split(": ")[1]) == (0, "verified, with weights of nothing but zeros")
    assert lines[-1] == f"  1 holds nothing but zeros, as {folder} does: {ROUTER}"


def test_what_the_source_has_too_is_faithful(made: Path, command: Command) -> None:
    code, text, _ = command("verify", made / "odd-pt", "--against", made / "odd", "--full")
    assert code == 0
    assert f"  2 hold NaN or infinity, as {made / 'odd'} does: {EMBED}, {NORM}" in text.splitlines()
    assert f"  4 hold nothing but zeros, as {made / 'odd'} does: {ALL}" in text.splitlines()
    code, text, _ = command("verify", made / "odd-pt", "--against", made / "odd", "--full", "--json")
    assert json.loads(text)["odd"]["not_finite"] == {EMBED: "source", NORM: "source"}


def spoiled(made: Path, tmp_path: Path, name: str = "clean-pt", **names: float) -> Path:
    return sealed(change(copy(made / name, tmp_path / "out"), **names))


@pytest.mark.parametrize(
    ("name", "change_", "problem"),
    [
        ("clean-pt", {NORM: NAN}, f"{NORM}: 1 of its values are NaN or infinity, the report says 0"),
        ("clean-int4", {EMBED: INFINITY}, f"{EMBED}: 1 of its values are NaN or infinity, the report says 0"),
        ("clean-int4", {ROUTER: 0}, f"{ROUTER}: holds nothing but zeros, and the report does not say so"),
        ("odd-pt", {NORM: 1}, f"{NORM}: 0 of its values are NaN or infinity, the report says 1"),
        ("odd-pt", {ROUTER: 1}, f"{ROUTER}: the report says that it holds nothing but zeros, and it holds others"),
    ],
)
def test_what_nobody_says_is_refused(
    name: str, change_: dict[str, float], problem: str, made: Path, command: Command, tmp_path: Path
) -> None:
    out = spoiled(made, tmp_path, name, **change_)
    code, text, err = command("verify", out, "--full")
    assert (code, text) == (1, "")
    assert err.splitlines()[1:] == [f"  {problem}"]


@pytest.mark.parametrize("change_", [{NORM: NAN}, {ROUTER: 0}])
def test_what_the_source_has_not_is_refused(change_: dict[str, float], made: Path, command: Command, tmp_path: Path) -> None:
    """Though the report says so."""
    out = spoiled(made, tmp_path, **change_)
    said = {"only_zeros": True} if ROUTER in change_ else {"not_finite": 1}
    edit(out, "report.json", lambda table: [row.update(said) for row in table["tensors"] if row["name"] in change_])
    assert command("verify", out, "--full")[0] == 0
    code, text, err = command("verify", out, "--full", "--against", made / "clean")
    assert (code, text) == (1, "")
    assert "should be the source's bytes, and is not" in err


def test_without_a_report_the_source_must_have_it(made: Path, command: Command, tmp_path: Path) -> None:
    out = unmeasured(copy(made / "odd-pt", tmp_path / "out"))
    code, _, err = command("verify", out, "--full")
    assert code == 1
    assert f"  {NORM}: 1 of its values are NaN or infinity, and no report says so; compare it with its source" in err
    code, text, _ = command("verify", out, "--full", "--against", made / "odd")
    assert (code, "not sound" in text) == (0, True)


def test_a_result_of_before_is_judged_by_its_source(made: Path, command: Command, tmp_path: Path) -> None:
    """Reports did not have these columns; the bytes are the source's all the same."""
    out = copy(made / "odd-pt", tmp_path / "out")
    edit(out, "report.json", lambda t: [row.pop(key, None) for row in t["tensors"] for key in ("not_finite", "only_zeros")])
    assert command("verify", out, "--full")[0] == 1
    assert command("verify", out, "--full", "--against", made / "odd")[0] == 0
