"""What TAB offers: commands, options, folders, recipes and jobs; nothing heavy is imported for it, and no address is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete, CompletionItem
from ernie_quant.cli.main import COMMANDS, group


def offers(*words: str) -> list[CompletionItem]:
    """For the last of the words; its type is plain, dir or file."""
    return BashComplete(group, {}, "ernie-quant", "_ERNIE_QUANT_COMPLETE").get_completions(list(words[:-1]), words[-1])


def plain(*words: str) -> list[str]:
    return [item.value for item in offers(*words) if item.type == "plain"]


def kinds(*words: str) -> set[str]:
    return {item.type for item in offers(*words)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what one has: models, recipes, notes."""
    for name in ("ERNIE-PT", "rules", "models"):
        (tmp_path / name).mkdir()
    for name in ("rules.toml", "recipe.toml", "rules/more.toml", "notes.txt", "models/tiny.gguf"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands() -> None:
    assert plain("") == list(COMMANDS)
    assert plain("wint") == ["wint4", "wint8", "wint2"]
    assert "What a checkpoint is" in offers("insp")[0].help  # shown by zsh and fish
    assert plain("--ver") == ["--version"]


def test_options_and_what_they_take() -> None:
    assert plain("wint4", "a", "b", "--exp") == ["--experts-only"]
    assert plain("wint4", "a", "b", "--group-size", "") == ["128", "64", "32", "channel"]
    assert plain("wint4", "a", "b", "--runtime", "f") == ["fastdeploy"]
    assert [name.upper() for name in plain("gguf", "a", "b", "--type", "Q4_K")] == ["Q4_K_M", "Q4_K_S"]


@pytest.mark.parametrize(
    "words",
    [("inspect", ""), ("convert", "a", "o"), ("verify", ""), ("report", ""), ("publish", ""), ("verify", "out", "--against", "")],
    ids=" ".join,
)
def test_folders(words: tuple[str, ...], here: Path) -> None:
    assert kinds(*words) == {"dir"}


def test_a_folder_with_gguf_files(here: Path) -> None:
    assert kinds("inspect", "models/") == kinds("inspect", f"{here}/models/ti") == {"file"}
    assert kinds("inspect", "models/other") == {"dir"}


@pytest.mark.parametrize("address", ["hf://", "hf://baidu/ERNIE", "modelscope://o/n@main"])
def test_an_address_is_left_alone(address: str) -> None:
    assert offers("inspect", address) == []


@pytest.mark.parametrize(
    "before", [("quantize", "a", "b", "--recipe"), ("plan", "a", "--recipe"), ("nightly",)], ids=lambda words: words[0]
)
def test_recipes_and_jobs(before: tuple[str, ...], here: Path) -> None:
    assert plain(*before, "") == ["recipe.toml", "rules.toml"]
    assert plain(*before, "ru") == ["rules.toml"]
    assert plain(*before, "rules/") == ["rules/more.toml"]
    assert plain(*before, f"{here}/re") == [f"{here}/recipe.toml"]
    assert plain(*before, "nowhere/") == []
    assert kinds(*before, "nowhere/") == {"dir"}


SCRIPT = """
eval "$(_ERNIE_QUANT_COMPLETE=bash_source ernie-quant)"
press() {  # what TAB makes of the words; folders are bash's own part
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    compopt() { printf '%s ' compopt "$@"; echo; }
    _ernie_quant_completion ernie-quant
    echo "= ${COMPREPLY[*]}"
}
press ernie-quant insp
press ernie-quant quantize a b --recipe ru
press ernie-quant wint4 E
press ernie-quant wint4 a b --no-s
complete -p ernie-quant
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_in_bash(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    program = tmp_path_factory.mktemp("bin") / "ernie-quant"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ernie_quant "$@"\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["bash", "--norc", "-c", SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "= inspect",
        "compopt -o dirnames ", "= rules.toml",
        "compopt -o dirnames ", "= ",
        "= --no-space-check",
        "complete -o nosort -F _ernie_quant_completion ernie-quant",
    ]  # fmt: skip
