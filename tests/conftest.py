"""What all tests share: golden values and the flag that alone may change them, the command, and a time limit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# before torch and transformers are imported: one thread (two shared cores are slower), no hub
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# before triton is: its kernels run on the CPU, in Python; `make gpu` says 0
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

SLOW = 3600  # seconds for a test that is marked so; a network drive and one busy core are still enough
pytest.register_assert_rewrite("helpers")  # asserts in there say what they found, as those of test modules do


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/outputs.json anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # the limit of all others stands in pyproject.toml
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW))


@pytest.fixture
def golden_value(request: pytest.FixtureRequest) -> Callable[[str, Any], Any]:
    """`golden_value(key, found)`: what was recorded for the key; --update-golden records what was found."""
    from helpers.paths import GOLDEN

    path = GOLDEN / "outputs.json"

    def value(key: str, found: Any) -> Any:
        table = json.loads(path.read_text()) if path.exists() else {}
        if request.config.getoption("--update-golden"):
            table[key] = found
            path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
        assert key in table, f"{path.name} has no {key}; a missing golden value is a failure (pytest --update-golden)"
        return table[key]

    return value


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`command("inspect", path)`: run ernie-quant in this process; exit code, stdout, stderr."""
    from ernie_quant.cli.main import main

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["ernie-quant", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def no_waiting_for_the_disk() -> Iterator[None]:
    """For modules that write much and do not ask whether it would survive a power cut."""
    from helpers.disk import no_waiting

    with no_waiting():
        yield


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless browser; without Chromium on the machine its tests are skipped."""
    from helpers.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    opened = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
