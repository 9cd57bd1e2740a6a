"""Calibration as somebody asks for it: by options, in a recipe, in a nightly job; and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import GOLDEN, copy, random_model, tensors
from helpers.runs import OF_128S
from helpers.words import byte_tokenizer

from ernie_quant.errors import PlanError
from ernie_quant.nightly.job import read_job
from ernie_quant.planning import recipe
from ernie_quant.planning.calibration import AUTO, Asked

RULES = '[[rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 4\ngroup_size = 32\n'


@pytest.fixture(autouse=True)
def _at_once() -> Any:
    with no_waiting():
        yield


def recipe_file(folder: Path, table: str, rules: str = RULES) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(f"{rules}[calibration]\n{table}")
    return path


def planned(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command(*arguments, "--dry-run", "--json")
    assert (code, err) == (0, "")
    return dict(json.loads(out))


def refused(command: Command, *arguments: object) -> str:
    code, out, err = command(*arguments)
    assert (code in (1, 2), out) == (True, "")
    return err.splitlines()[-1]


# --- files -------------------------------------------------------------------------------------------------------------


def test_files_are_those_beside_the_recipe(book: Path, tmp_path: Path) -> None:
    table = 'text = ["book.txt"]\ntokens = 1024\nseed = 3\nmethod = "feedback"\nfit = true\n'
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/book.txt").write_text(book.read_text())
    found = recipe.read(recipe_file(tmp_path / "recipes", table)).calibration
    assert found == Asked((tmp_path / "recipes/book.txt",), 1024, 3, "feedback", True)
    assert recipe.read(recipe_file(tmp_path, 'text = "auto"\n')).calibration == Asked(AUTO)


MISTAKES = [
    ("", 'text is missing: "auto" or a list of files'),
    ('text = "book.txt"', "text is 'book.txt', not \"auto\" or a list of files"),
    ("text = []", 'text is [], not "auto" or a list of files'),
    ("text = [3]", 'text is [3], not "auto" or a list of files'),
    ('text = ["nowhere.txt"]', "text: FOLDER/nowhere.txt is no file"),
    ('text = "auto"\ntokens = "16k"', "tokens is '16k', not a whole number"),
    ('text = "auto"\ntokens = 100', "tokens is 100, not from 512 to 16777216"),
    ('text = "auto"\nseed = 1.5', "seed is 1.5, not a whole number"),
    ('text = "auto"\nfit = "yes"', "fit is 'yes', not true or false"),
    ('text = "auto"\nmethod = "gptq"', "method is 'gptq', not nearest, feedback or descent"),
    ('text = "auto"\nlanguage = "de"', "language: unknown"),
]


@pytest.mark.parametrize(("table", "expected"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_a_line(table: str, expected: str, tmp_path: Path) -> None:
    """In a recipe and in a job the same one."""
    line = expected.replace("FOLDER", str(tmp_path))
    with pytest.raises(PlanError) as error:
        recipe.read(recipe_file(tmp_path, table))
    assert error.value.problems == [f"[calibration]: {line}"]
    job = tmp_path / "job.toml"
    job.write_text(f'[source]\nrepo = "."\n[[target]]\nrepo = "me/it"\nrecipe = "wint4"\n[target.calibration]\n{table}\n')
    with pytest.raises(PlanError) as error:
        read_job(job)
    assert error.value.problems == [f"[[target]] 1 [calibration]: {line}"]


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'calibration = "auto"\n{RULES}')
    with pytest.raises(PlanError) as error:
        recipe.read(path)
    assert "[calibration]: is not a table" in error.value.problems


# --- options instead of the recipe's -----------------------------------------------------------------------------------

INSTEAD = [
    ((), {"name": "book.txt", "tokens": 1024, "fit": True, "method": "feedback", "seed": 3}),
    (("--calibration-tokens", 512), {"name": "book.txt", "tokens": 512, "fit": True}),
    (("--method", "nearest"), {"method": "nearest", "tokens": 1024}),
    (("--no-fit",), {"fit": False, "name": "book.txt"}),
    (("--calibration", "auto"), {"name": "auto", "tokens": 1024, "seed": 3, "fit": True}),
]


@pytest.mark.parametrize(("options", "expected"), INSTEAD, ids=[" ".join(map(str, row[0])) or "none" for row in INSTEAD])
def test_an_option_stands_instead_of_the_recipes(
    options: tuple[Any, ...], expected: dict[str, Any], model: Path, book: Path, tmp_path: Path, command: Command
) -> None:
    table = f'text = ["{book}"]\ntokens = 1024\nseed = 3\nmethod = "feedback"\nfit = true\n'
    found = planned(command, "quantize", model, tmp_path / "out", "--recipe", recipe_file(tmp_path, table), *options)
    assert {key: found["calibration"][key] for key in expected} == expected
    method = found["calibration"]["method"]
    (experts,) = {group["codec"] for group in found["groups"] if group["role"] == "experts"}
    assert experts == "int4, group 32, mse" + ("" if method == "nearest" else f", {method}")


def test_the_recipe_and_the_options_give_the_same_bytes(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    table = f'text = ["{book}"]\ntokens = 512\nmethod = "nearest"\nfit = true\n'
    one, other = tmp_path / "one/out", tmp_path / "other/out"
    assert command("quantize", model, one, "--recipe", recipe_file(tmp_path, table), "--quiet")[0] == 0
    asked = ("--calibration", book, "--calibration-tokens", 512, "--method", "nearest", "--fit")
    assert command("wint4", model, other, "--experts-only", "--group-size", 32, *asked, "--quiet")[0] == 0
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_rule_of_another_method_and_the_option_contradict(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    rules = f'{RULES}method = "feedback"\n'
    path = recipe_file(tmp_path, f'text = ["{book}"]\n', rules)
    found = planned(command, "quantize", model, tmp_path / "out", "--recipe", path)
    assert {g["codec"] for g in found["groups"] if g["role"] == "experts"} == {"int4, group 32, mse, feedback"}  # the rule's
    line = refused(command, "quantize", model, tmp_path / "out", "--recipe", path, "--method", "descent")
    assert line == "Error: --method descent: the recipe's rule for role experts says method = 'feedback'; leave one out"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--method", "feedback"), "--method makes codes of a text: name some"),
        (("--calibration-tokens", 600), "--calibration-tokens counts tokens of a text: name some"),
        (("--fit",), "--fit fits weights to text: name some"),
    ],
)
def test_options_without_a_text(option: tuple[Any, ...], words: str, model: Path, tmp_path: Path, command: Command) -> None:
    assert words in refused(command, "wint4", model, tmp_path / "out", *option)


# --- refused before any work -------------------------------------------------------------------------------------------


def test_a_recipe_that_changes_nothing_text_runs_through(model: Path, book: Path, tmp_path: Path, command: Command) -> None:
    path = recipe_file(tmp_path, f'text = ["{book}"]\n', '[[rule]]\nrole = "experts"\ncodec = "keep"\n')
    line = refused(command, "quantize", model, tmp_path / "out", "--recipe", path)
    assert "cannot be calibrated: the recipe quantizes nothing" in line
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_the_mtp_block_alone(book: Path, tmp_path: Path, command: Command) -> None:
    source = byte_tokenizer(copy(GOLDEN / "moe_mtp/paddle", tmp_path / "src"))
    path = recipe_file(tmp_path, f'text = ["{book}"]\n', RULES.replace("experts", "mtp"))
    line = refused(command, "quantize", source, tmp_path / "out", "--recipe", path)
    assert line.endswith("nothing that is quantized is in a layer that text runs through; leave it out")


def test_a_source_without_a_tokenizer_is_refused_in_the_plan(book: Path, tmp_path: Path, command: Command) -> None:
    line = refused(command, "wint4", GOLDEN / "moe/paddle", tmp_path / "out", "--calibration", book, "--dry-run")
    assert "has no tokenizer (looked for tokenizer.json, tokenizer.model)" in line
    path = recipe_file(tmp_path, 'text = "auto"\n')
    assert "has no tokenizer" in refused(command, "quantize", GOLDEN / "moe/paddle", tmp_path / "out", "--recipe", path)
    assert not (tmp_path / "out").exists()


# --- what a plan says --------------------------------------------------------------------------------------------------


def test_a_dry_run_names_the_text_and_what_it_does_not_reach(book: Path, tmp_path: Path, command: Command) -> None:
    source = byte_tokenizer(copy(GOLDEN / "moe_mtp/paddle", tmp_path / "src"))
    asked = ("--group-size", 32, "--experts-only", "--mtp", "--calibration", book, "--fit", "--dry-run")
    code, out, _ = command("wint4", source, tmp_path / "out", *asked)
    assert code == 0
    lines = out.splitlines()
    fitted = "; o_proj and the shared experts' down_proj are fitted too"
    assert f"calibrated on book.txt: 16384 tokens, method descent{fitted}" in lines
    assert "note: the MTP block: 7 weights are quantized data-free: no text runs through it" in lines
    kept = "2 weights that are kept may be fitted to the text, where that helps: model.layers.*.self_attn.o_proj.weight"
    assert f"note: {kept}" in lines


def test_vision_experts_stay_as_they_would_be_without_text(book: Path, tmp_path: Path, command: Command) -> None:
    source = byte_tokenizer(copy(GOLDEN / "vl/paddle", tmp_path / "src"))
    asked = ("wint4", source, tmp_path / "out", "--group-size", "channel", "--experts-only", "--calibration", book)
    notes = planned(command, *asked)["notes"]
    assert any(note.startswith("vision experts: ") and note.endswith("data-free: text goes to other experts") for note in notes)


def test_fp8_beside_codes_that_look_at_inputs_stays_data_free(book: Path, tmp_path: Path, command: Command) -> None:
    source = byte_tokenizer(random_model(tmp_path / "src", "paddle", **OF_128S | {"vocab_size": 256, "moe_num_experts": 4}))
    alone = recipe_file(tmp_path, f'text = ["{book}"]\n', '[[rule]]\nrole = "experts"\ncodec = "fp8"\n')
    line = refused(command, "quantize", source, tmp_path / "out", "--recipe", alone)
    assert line.endswith("fp8 takes the nearest codes whatever a text says; leave it out")
    rules = f'{RULES}[[rule]]\nrole = "shared_experts"\ncodec = "fp8"\nquant_method = "compressed-tensors"\n'
    path = recipe_file(tmp_path, f'text = ["{book}"]\ntokens = 512\nmethod = "nearest"\nfit = true\n', rules)
    plain = tmp_path / "plain.toml"
    plain.write_text(rules)
    notes = planned(command, "quantize", source, tmp_path / "out", "--recipe", path)["notes"]
    assert any("quantized data-free: no method of it looks at inputs" in note for note in notes)
    for out, file in (("out", path), ("free", plain)):
        assert command("quantize", source, tmp_path / out, "--recipe", file, "--quiet")[0] == 0
    ours, free = tensors(tmp_path / "out"), tensors(tmp_path / "free")
    assert all(ours[name].equal(free[name]) for name in free if "shared_experts" in name)
    assert not all(ours[name].equal(free[name]) for name in free if ".experts." in name)
