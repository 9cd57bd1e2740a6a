"""What a run tells a log: a line every so often, with files, rate and time left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ernie_quant.cli import _progress
from helpers.models import GOLDEN

from ernie_quant.run.whole import FileDone


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_so_often() -> None:
    clock, said = Clock(), []
    lines = _progress.Lines(100 * 10**9, said.append, clock, every=60)
    for second in range(1, 201):
        clock.now = second
        if second % 50 == 0:
            lines.file(FileDone("f", second // 50, 8, 1, 1, 1.0))
        lines(25 * 10**7)
    assert said == [
        "5.00 of 100.00 GB, 0.250 GB/s, 6 min left",
        "1 of 8 files, 20.00 of 100.00 GB, 0.250 GB/s, 5 min left",
        "2 of 8 files, 35.00 of 100.00 GB, 0.250 GB/s, 4 min left",
        "4 of 8 files, 50.00 of 100.00 GB, 0.250 GB/s, 3 min left",
    ]


def test_what_is_over_in_a_moment_says_nothing() -> None:
    clock, said = Clock(), []
    lines = _progress.Lines(1000, said.append, clock)
    clock.now = 15.0
    lines(1000)
    assert said == []


def test_nothing_done_has_no_end_in_sight() -> None:
    clock, said = Clock(), []
    lines = _progress.Lines(10**9, said.append, clock)
    clock.now = 30.0
    lines(0)
    clock.now = 100.0
    lines(-5)  # of a file that is done again
    assert said == ["0.00 of 1.00 GB, 0.000 GB/s", "-0.00 of 1.00 GB, -0.000 GB/s"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3540, "59 min"), (7500, "2 h 5 min"), (90000, "25 h 0 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert _progress.duration(seconds) == text


def test_calibration_tells_a_log_too() -> None:
    clock, said = Clock(), []
    moved = _progress._of_layers(said.append, clock)
    for second in range(0, 101, 10):
        clock.now = second
        moved(0.5 + second / 400, f"layer {second}")
    assert said == ["layer 20: 55.0%, 3 min left", "layer 80: 70.0%, 2 min left"]


@pytest.mark.parametrize(("options", "lines"), [((), True), (("-q",), False)])
def test_without_a_terminal_there_are_lines_on_stderr(options: tuple[str, ...], lines: bool, tmp_path: Path) -> None:
    """At once, for a test that does not wait a minute."""
    program = (
        "import sys; from ernie_quant.cli import _progress; _progress.FIRST = _progress.EVERY = 0.0;"
        "from ernie_quant.cli.main import main; main()"
    )
    words = [
        "wint4",
        str(GOLDEN / "moe/paddle"),
        str(tmp_path / "out"),
        "--group-size",
        "32",
        "--max-shard-size",
        "60kB",
        *options,
    ]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert ("of 4 files, " in done.stderr) == lines
    assert lines or done.stderr == ""
