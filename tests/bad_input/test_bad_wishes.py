"""Everything that a user can ask for in vain: widths, folders, recipes, options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.bad_input import CONVERT, WINT4, Run, refused
from helpers.synthetic import tiny, wide, write_model, write_pdparams

# --- what does not fit -----------------------------------------------------------------------------------------------


FFN = "model.layers.*.mlp.experts.*"


def test_a_group_size_that_divides_no_width_is_refused_for_all_of_them_at_once(run: Run, source: Callable[..., Path]) -> None:
    source()
    refused(
        run("wint4", "SRC", "OUT", "--experts-only"),
        f"{FFN}.down_proj.weight: group_size 128 does not divide 32 inputs; 32, channel would (16 tensors)",
        f"{FFN}.gate_proj.weight: group_size 128 does not divide 64 inputs; 64, 32, channel would (16 tensors)",
        f"{FFN}.up_proj.weight: group_size 128 does not divide 64 inputs; 64, 32, channel would (16 tensors)",
    )


def test_keep_unfit_keeps_them_and_says_so(run: Run, source: Callable[..., Path]) -> None:
    source()
    outcome = run("wint4", "SRC", "OUT", "--keep-unfit", "--experts-only", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.stdout)
    assert result["quantized"] == 0
    assert result["bits_per_weight"] == pytest.approx(16, abs=0.2)  # routers are float32
    line = "kept, because model.layers.*.mlp.experts.*.down_proj.weight: group_size 128 does not divide 32 inputs"
    assert any(note.startswith(line) for note in result["notes"])
    assert "quantization_config" not in json.loads((outcome.out / "config.json").read_text())


def test_fp8_blocks_that_do_not_divide_a_width(run: Run, source: Callable[..., Path]) -> None:
    source()
    refused(
        run("fp8", "SRC", "OUT", "--experts-only"),
        f"{FFN}.down_proj.weight: blocks of 128 do not divide 64 and 32 (16 tensors)",
        f"{FFN}.gate_proj.weight: blocks of 128 do not divide 32 and 64 (16 tensors)",
        f"{FFN}.up_proj.weight: blocks of 128 do not divide 32 and 64 (16 tensors)",
    )


def test_fp8_of_the_experts_of_a_model_whose_k_and_v_are_too_narrow(run: Run, tmp_path: Path) -> None:
    config, tensors = wide()
    write_model(tmp_path / "src", config, tensors)
    outcome = run("fp8", "SRC", "OUT")
    assert (outcome.code, outcome.files) == (1, [])
    for x in "kv":
        assert f"  model.layers.*.self_attn.{x}_proj.weight: blocks of 128 do not divide 64 (2 tensors)\n" in outcome.stderr
    assert run("fp8", "SRC", "OUT", "--experts-only", "--quiet").code == 0


# --- output folders --------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty_and_not_ours(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    for options in ((), ("--restart",)):
        outcome = run(*CONVERT, *options)
        assert outcome.code == 1
        line = "is not empty and was not made by ernie-quant; choose another folder"
        assert outcome.stderr == f"error: {tmp_path / 'out'}: {line}\n"
        assert outcome.files == ["thesis.tex"]
    assert (tmp_path / "out" / "thesis.tex").read_text() == "dear"


def test_an_output_folder_that_is_a_file(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    (tmp_path / "out").write_text("dear")
    refused(run(*CONVERT), f"{tmp_path / 'out'}: is a file, not a folder")
    assert (tmp_path / "out").read_text() == "dear"


@pytest.mark.parametrize("where", ["src", "src/inside", ".", "src/../src"])
def test_an_output_folder_in_or_around_the_source(run: Run, source: Callable[..., Path], tmp_path: Path, where: str) -> None:
    folder = source()
    before = sorted(p.name for p in folder.iterdir())
    outcome = run("convert", "SRC", tmp_path / where, "--to", "pt")
    refused(outcome, f"{tmp_path / where}: the output folder must lie beside the source {folder}, not in or around it")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_an_output_folder_that_is_a_link_to_the_source(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source()
    (tmp_path / "out").symlink_to(folder)
    outcome = run(*CONVERT)
    assert (outcome.code, outcome.files) == (1, ["config.json", "model.safetensors"])
    assert "must lie beside the source" in outcome.stderr


def test_an_output_folder_of_another_plan(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    assert run(*CONVERT, "--quiet").code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    outcome = run(*WINT4)
    assert outcome.code == 1
    changed = "codecs rtn: is 2, was not there; recipe name: is wint4, was keep"
    assert f"holds the result of another plan ({changed};" in outcome.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert run(*CONVERT).stdout == f"{tmp_path / 'out'}: complete\n"


# --- recipes ---------------------------------------------------------------------------------------------------------


BROKEN_RECIPE = """
title = "mine"
[[rule]]
role = "experts"
match = "mlp"
codec = "rtn"
[[rule]]
codec = "rtn"
[[rule]]
role = "router"
codec = "rtn"
[[rule]]
match = "("
codec = "rtn"
[[rule]]
role = "experts"
[[rule]]
role = "experts"
codec = "awq"
[[rule]]
role = "experts"
codec = "rtn"
bit = 4
[[rule]]
role = "experts"
codec = "rtn"
bits = "4"
[[rule]]
role = "experts"
codec = "rtn"
group_size = 100
[[rule]]
role = "experts"
codec = "rtn"
scale = "max"
"""


def test_every_mistake_of_a_recipe_is_listed(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    (tmp_path / "mine.toml").write_text(BROKEN_RECIPE)
    outcome = run("quantize", "SRC", "OUT", "--recipe", tmp_path / "mine.toml")
    lines = [line.strip() for line in outcome.stderr.splitlines()]
    assert (outcome.code, outcome.files) == (1, [])
    assert lines[0] == f"error: {tmp_path / 'mine.toml'}: 11 mistake(s)"
    expected = [
        "title: unknown; a recipe has [[rule]] tables, [calibration] and runtime",
        "rule 1: needs one of role, match and names",
        "rule 2: needs one of role, match and names",
        "rule 3: role 'router' is not one that can be quantized (experts, vision_experts, shared_experts, mlp, attention, embed",
        "rule 4: match '(' is no regular expression: ",
        "rule 5: needs a codec",
        "rule 6: there is no codec 'awq'; there are ",
        "rule 7: codec rtn has no option bit; it takes bits, ",
        "rule 8: codec rtn: bits is '4', not 2, 4 or 8",
        "rule 9: codec rtn: group_size is 100, not 'channel' or a multiple of 8 from 16 on",
        "rule 10: codec rtn: scale is 'max', not mse or absmax",
    ]
    assert len(lines) == 12
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[rule]", "is not valid TOML"),
        ("", "has no [[rule]]"),
        ("rule = 5", "has no [[rule]]"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_recipe_that_is_none(run: Run, source: Callable[..., Path], tmp_path: Path, text: str | None, reason: str) -> None:
    source()
    if text is not None:
        (tmp_path / "mine.toml").write_text(text)
    refused(run("quantize", "SRC", "OUT", "--recipe", tmp_path / "mine.toml"), f"{tmp_path / 'mine.toml'}: {reason}")


def test_a_rule_that_fits_nothing(run: Run, source: Callable[..., Path], tmp_path: Path) -> None:
    source()
    rules = [("role", "vision_experts"), ("match", r"layers\.7\.")]
    (tmp_path / "mine.toml").write_text("".join(f"[[rule]]\n{key} = '{value}'\ncodec = 'rtn'\n" for key, value in rules))
    refused(
        run("quantize", "SRC", "OUT", "--recipe", tmp_path / "mine.toml"),
        "recipe mine: no linear of this model fits role vision_experts",
        r"recipe mine: no linear of this model fits match = 'layers\\.7\\.'",
    )


# --- a process of its own --------------------------------------------------------------------------------------------


def test_inspect_shows_anomalies_and_exits_with_1(run: Run, source: Callable[..., Path]) -> None:
    source({"model.norm.weight": None, "model.ghost": torch.zeros(1)})
    outcome = run("inspect", "SRC")
    assert (outcome.code, outcome.stderr) == (1, "")
    assert outcome.stdout.splitlines()[-2:] == [
        "anomaly: model.ghost: is unknown to this architecture, 1, in model.safetensors",
        "anomaly: model.norm.weight: is missing",
    ]


def test_wrong_usage_exits_with_2(run: Run) -> None:
    for args in (("convert", "SRC", "OUT"), ("wint5", "SRC", "OUT"), ("wint4", "SRC"), (*WINT4[:4], "--group-size", "7")):
        assert run(*args).code == 2


def test_a_process_says_one_line_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(tiny()[0]))
    write_pdparams(tmp_path / "src" / "model_state.pdparams", {"w": torch.zeros(2)})
    os.truncate(tmp_path / "src" / "model_state.pdparams", 100)
    command = [sys.executable, "-m", "ernie_quant", "wint4", str(tmp_path / "src"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: model_state.pdparams: pickle ends in the middle; it was not loaded\n"
    assert not (tmp_path / "out").exists()


def test_keep_unfit_keeps_all_of_a_layer_of_which_one_tensor_does_not_fit(run: Run, source: Callable[..., Path]) -> None:
    """Groups of 64 divide the 64 inputs of gate and up, not the 32 of down; the experts are one layer in memory."""
    source()
    outcome = run("wint4", "SRC", "OUT", "--keep-unfit", "--experts-only", "--group-size", "64", "--json")
    assert outcome.code == 0
    notes = json.loads(outcome.stdout)["notes"]
    assert "32 more tensors are kept, as parts of the same layers" in notes
