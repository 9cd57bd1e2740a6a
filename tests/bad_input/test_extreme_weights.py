"""Finite weights that are no weights, through every command that quantizes: a line with the name, or a sound result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.bad_input import EXPERT, Outcome, Run, refused
from helpers.synthetic import wide, write_model

from ernie_quant import jsonio

TWO_BITS = '[[rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 2\ngroup_size = 64\nscale = "absmax"\n'
PADDLE_EXPERT = "ernie.layers.1.mlp.experts.0.up_gate_proj.weight"  # of which EXPERT is a half
COMMANDS = [
    ("wint4", "--experts-only"),
    ("wint4", "--experts-only", "--scale", "absmax"),
    ("wint4", "--experts-only", "--group-size", "channel", "--scale", "absmax"),
    ("wint8", "--experts-only"),
    ("wint8", "--experts-only", "--scale", "absmax"),
    ("fp8", "--experts-only"),
    ("quantize", "--recipe", "RECIPE", "--runtime", "transformers"),
    ("wint4", "--runtime", "fastdeploy"),
    ("wint4", "--runtime", "fastdeploy", "--scale", "absmax"),
    ("wint4", "--runtime", "fastdeploy", "--tp", "2"),
    ("wint2", "--wint4-layers", "0", "--effort", "1"),
]


@pytest.fixture
def quantize(run: Run, tmp_path: Path) -> Callable[..., Outcome]:
    """A command on the model whose first expert is `fill(expert)`."""
    (tmp_path / "rules.toml").write_text(TWO_BITS)

    def call(command: tuple[str, ...], fill: Callable[[torch.Tensor], object]) -> Outcome:
        config, tensors = wide()
        tensors[EXPERT] = tensors[EXPERT].clone()
        fill(tensors[EXPERT])
        write_model(tmp_path / "src", config, tensors)
        name, *options = (tmp_path / "rules.toml" if word == "RECIPE" else word for word in command)
        return run(name, "SRC", "OUT", *options, "--quiet")

    return call


@pytest.mark.parametrize("value", [3.389e38, -3.389e38, 2.0**121], ids=lambda value: f"{value:g}")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_huge_weight_is_refused_by_name(quantize: Callable[..., Outcome], command: tuple[str, ...], value: float) -> None:
    name = PADDLE_EXPERT if {"fastdeploy", "wint2"} & {*command} else EXPERT
    stored = torch.tensor(value).bfloat16().item()
    line = f"{name}: holds {stored:.4g}; weights are quantized up to 1.329e+36 (2^120), and no sound model has larger ones: get"
    refused(quantize(command, lambda expert: expert[3].fill_(value)), line)


@pytest.mark.parametrize("value", [2.0**120, 9.2e-41], ids=lambda value: f"{value:g}")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_is_not_refused_is_finite_in_files_and_report(
    quantize: Callable[..., Outcome], run: Run, command: tuple[str, ...], value: float, tmp_path: Path
) -> None:
    outcome = quantize(command, lambda expert: expert[::2].fill_(value))
    assert (outcome.code, outcome.stderr) == (0, "")
    report = jsonio.read_object(tmp_path / "out/report.json")  # refuses NaN and Infinity
    assert [row["name"] for row in report["tensors"] if row["rel_error"] > 1] == []
    done = run("verify", "OUT", "--against", "SRC", "--full", "--json")
    assert (done.code, json.loads(done.stdout)["status"]) == (0, "verified")
    assert run("report", "OUT", "--quiet").code == 0
