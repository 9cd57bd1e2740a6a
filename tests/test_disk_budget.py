"""`--disk-budget` bounds what lies here of a hub; a folder lies here already."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from ernie_quant.cli.main import COMMANDS, group
from helpers import w4a8
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import write
from helpers.synthetic import wide, write_model

from ernie_quant.planning.built_in import fastdeploy_container

COMMAND_LINES = [
    ("convert", "SRC", "--to", "pt"),
    ("gguf", "SRC", "--keep-unfit"),
    ("wint4", "SRC", "--experts-only", "--group-size", "32"),
    ("wint4", "SRC", "--runtime", "fastdeploy", "--tp", "2"),
    ("wint8", "SRC", "--group-size", "32"),
    ("fp8", "SRC", "--keep-unfit"),
    ("mxfp4", "SRC"),
    ("nvfp4", "SRC"),
    ("wint2", "SRC", "--wint4-layers", "0"),
    ("w4a8", "WIDE", "--calibration", "auto"),
    ("quantize", "SRC", "--recipe", "RECIPE"),
    ("dequantize", "CONTAINER", "--to", "pt"),
    ("reshard", "CONTAINER", "--tp", "1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, its container for FastDeploy, and rules.toml."""
    folder = tmp_path_factory.mktemp("budget")
    write_model(folder / "src", *wide())
    w4a8.model(folder / "wide")
    (folder / "rules.toml").write_text('[[rule]]\nrole = "experts"\ncodec = "rtn"\ngroup_size = 64\n')
    with no_waiting():
        write(folder / "src", folder / "container", "fastdeploy", recipe=fastdeploy_container("wint2", 0, effort=1))
    return folder


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_it_is_refused_for_a_folder(arguments: tuple[str, ...], folder: Path, command: Command, tmp_path: Path) -> None:
    places = {"SRC": folder / "src", "CONTAINER": folder / "container", "RECIPE": folder / "rules.toml"}
    places["WIDE"] = folder / "wide"
    name, source, *options = (places.get(word, word) for word in arguments)
    for more in ((), ("--dry-run",)):
        code, out, err = command(name, source, tmp_path / "out", *options, "--disk-budget", "5GB", *more)
        line = f"Error: --disk-budget is for a source on a hub; {source} is a folder, leave it out"
        assert (code, out, err.splitlines()[-1]) == (2, "", line)
    assert not (tmp_path / "out").exists()
    assert command(name, source, tmp_path / "out", *options, "--dry-run")[0] == 0


def test_every_command_that_has_the_option_is_among_them() -> None:
    found = {name: group.get_command(click.Context(group), name) for name in COMMANDS}
    budgets = {name for name, command in found.items() if command and any(o.name == "disk_budget" for o in command.params)}
    assert budgets == {arguments[0] for arguments in COMMAND_LINES}
