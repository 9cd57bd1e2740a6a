"""A loopback hub in this process that every command takes for the hub, and waiting that takes no time.

PYTEST_DONT_REWRITE: tests import from here, and name it as their plugin.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.plan import built_in, recipe
from ernie_quant.plan.make import make_plan
from ernie_quant.plan.steps import Plan
from ernie_quant.sources import download, open_source
from ernie_quant.sources import hub as sources_hub
from helpers.hub import LoopbackHub
from helpers.hub.wire import Request
from helpers.models import GOLDEN

SOURCE = GOLDEN / "moe/paddle"  # five weight files of 63 to 100 kB
NAME = "baidu/ERNIE-tiny-Paddle"
ADDRESS = f"hf://{NAME}"
SMALL = 60_000  # bytes per file: four files; the first and the last need the same file of the source
INT4 = built_in.one_codec("wint4", RoundToNearest(4, 32), experts_only=False, mtp=False, keep_unfit=False)
CHUNK = 1 << 12  # bytes; what a broken connection may lose
real_sleep = time.sleep


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


def planned(source: str | Path = ADDRESS, rules: recipe.Recipe = INT4, shard_bytes: int = SMALL) -> Plan:
    return make_plan(open_source(source), runtime="vllm", recipe=rules, shard_bytes=shard_bytes)


def least_budget(plan: Plan) -> int:
    assert isinstance(plan.source.downloader, download.HubDownloader)
    return plan.source.downloader.needed_at_once([shard.needs for shard in plan.shards])


def weights_asked(hub: LoopbackHub) -> list[tuple[str, str]]:
    """File and Range of every request for the content of a weight file."""
    return [(r.path.rsplit("/", 1)[1], r.range) for r in hub.requests if r.host == "cdn" and r.method == "GET"]


def writes(hub: LoopbackHub) -> list[Request]:
    """Requests that change something, or try to."""
    return [r for r in hub.requests if r.method not in ("GET", "HEAD")]


def contents(folder: Path, but: Collection[str] = ()) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: p.read_bytes() for p in files if (name := p.relative_to(folder).as_posix()) not in but}


def files_of(cache: Path) -> list[Path]:
    """Weight files, or parts of some, that lie in the cache."""
    return [p for folder in cache.glob("*/*/files") for p in folder.rglob("*") if p.is_file()]
