"""The command line on SRC and OUT, and a good model to be broken as SRC."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_input import Outcome, Run
from helpers.synthetic import tiny, write_model

from ernie_quant.cli.main import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command line in this process; SRC and OUT stand for `tmp_path/src` and `tmp_path/out`."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*args: object) -> Outcome:
        named = {"SRC": tmp_path / "src", "OUT": tmp_path / "out"}
        monkeypatch.setattr(sys, "argv", ["ernie-quant", *(str(named.get(str(a), a)) for a in args)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err, tmp_path / "out")

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Write the golden PT model with experts, changed, as SRC."""

    def write(tensors: dict[str, Any] | None = None, *, model: str = "moe", shards: int = 1, **config: Any) -> Path:
        settings, stored = tiny(model, **config)
        stored |= tensors or {}
        return write_model(tmp_path / "src", settings, {n: t for n, t in stored.items() if t is not None}, shards)

    return write
