"""A loopback hub in this process that every command takes for the hub, and waiting that takes no time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import CHUNK, NAME, SOURCE, planned
from helpers.models import copy
from helpers.nights import Night

from ernie_quant.publish import files as publishing
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import download
from ernie_quant.sources import hub as sources_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """With the source in it. conftest.py has said HF_HUB_OFFLINE=1; see test_loopback_hub.py for the client's constants."""
    pytest.importorskip("huggingface_hub", minversion="2.0")
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with LoopbackHub(tmp_path / "hub", chunk_bytes=1 << 16, page_size=4) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("ernie_quant.hubs.hf.read.CHUNK", CHUNK)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("ERNIE_QUANT_CACHE", str(tmp_path / "cache"))
        close_session()
        hub.put(NAME, SOURCE)
        yield hub
        close_session()
        assert not hub.leaks  # the other host never sees the token


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that somebody wanted to wait; nobody does."""
    found: list[float] = []

    def pause(self: download.HubDownload, seconds: float) -> None:
        if seconds:
            found.append(seconds)
        if self._stop.is_set():
            raise download.Stopped

    monkeypatch.setattr(time, "sleep", lambda seconds: found.append(seconds) if seconds else None)
    monkeypatch.setattr(download.HubDownload, "_pause", pause)
    return found


@pytest.fixture
def short_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the tests are smaller than what is usually asked for at first."""
    monkeypatch.setattr(sources_hub, "HEAD", 1000)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of four weight files that is made from the folder."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_plan(planned(SOURCE), out)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copy(finished, tmp_path / "out")


@pytest.fixture(scope="session")
def local(finished: Path) -> dict[str, bytes]:
    """Its files."""
    return contents(finished)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the rest."""
    monkeypatch.setattr(publishing, "_pictures", lambda found: {})


@pytest.fixture
def night(hub: LoopbackHub, tmp_path: Path, waits: list[float]) -> Night:
    return Night(tmp_path)
