"""What the group of commands says: lines that fit, headings, near names for typos, one line on Windows, and quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ernie_quant.cli import _group
from ernie_quant.cli.main import COMMANDS, group
from helpers.commands import Command


def help_at(width: int) -> str:
    found = CliRunner().invoke(group, ["--help"], prog_name="ernie-quant", terminal_width=width)
    assert found.exit_code == 0
    return found.output


def test_every_command_has_its_whole_line_in_eighty_columns() -> None:
    text = help_at(80)
    assert "..." not in text.partition("Options:")[2]
    shown = text.splitlines()
    assert [name for name, line in _group.LINES.items() if f"  {name:{_group.WIDEST}}  {line}" not in shown] == []
    assert len(COMMANDS) == len(set(COMMANDS)) == 22


def test_commands_stand_under_headings() -> None:
    lines = help_at(80).splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Options:", "Look:", "Convert:", "Quantize:", "Check:", "Publish:"]
    assert (
        lines.index("Look:")
        < lines.index("  plan        What can be made of it, and on how many GPUs.")
        < lines.index("Convert:")
    )


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("inpsect", "Did you mean inspect?"),
        ("WINT4", "Did you mean wint4 or wint8?"),
        ("verfy", "Did you mean verify?"),
        ("quantise", "Did you mean quantize or dequantize?"),
        ("help", "There are inspect, plan, convert,"),
    ],
)
def test_a_name_that_is_none(typed: str, hint: str, command: Command) -> None:
    code, out, err = command(typed)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"Error: No such command '{typed}'. {hint}")


def test_an_option_that_is_none(command: Command) -> None:
    code, _, err = command("wint4", "src", "out", "--expert-only")
    assert (code, "--experts-only" in err) == (2, True)


def test_a_long_name_is_cut(command: Command) -> None:
    assert len(command("x" * 10_000)[2].splitlines()[-1]) < 300


def test_windows_is_told_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie_quant.cli.main.os.name", "nt")
    monkeypatch.setattr(sys, "argv", ["ernie-quant", "--help"])
    with pytest.raises(SystemExit) as stopped:
        group_main()
    monkeypatch.undo()
    assert stopped.value.code == "error: ernie-quant runs on Linux and macOS; on Windows use it inside WSL"


def group_main() -> None:
    from ernie_quant.cli.main import main

    main()


IMPORTED = """
import sys
sys.modules["fcntl"] = None  # as on Windows
sys.argv = ["ernie-quant", *sys.argv[1:]]
from ernie_quant.cli.main import main
try:
    main()
finally:
    print(*sorted(m for m in sys.modules if m.startswith("ernie_quant.")))
"""


def test_help_imports_no_command_and_no_locks() -> None:
    """So it comes as far as the one line where there is no fcntl."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == [
        "ernie_quant.cli", "ernie_quant.cli._group", "ernie_quant.cli._streams", "ernie_quant.cli.main", "ernie_quant.errors",
        "ernie_quant.version",
    ]  # fmt: skip


def test_completing_imports_nothing_heavy() -> None:
    """Of a command's options, which imports it."""
    more = {"_ERNIE_QUANT_COMPLETE": "bash_complete", "COMP_WORDS": "ernie-quant wint4 --ex", "COMP_CWORD": "2"}
    heavy = ("torch", "numba", "numpy", "scipy", "huggingface_hub", "tqdm", "safetensors")
    program = (
        "import atexit, sys; from ernie_quant.cli.main import main;"
        f"atexit.register(lambda: print('LOADED', *sorted(set({heavy}) & sys.modules.keys()))); main()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | more, capture_output=True, text=True, check=False)
    assert "--experts-only" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_it_is_said_where_it_is_read() -> None:
    root = Path(__file__).parents[1]
    for file in ("README.md", "docs/installing.md"):
        assert "Linux and macOS" in (root / file).read_text()
