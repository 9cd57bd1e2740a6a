"""What is asked of the loopback hub, what came of it, and plans of the checkpoint in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.planning import built_in, recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.run.whole import RunResult, run_plan
from ernie_quant.sources import download, open_source
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hub.wire import Request
from helpers.models import GOLDEN

SOURCE = GOLDEN / "moe/paddle"  # five weight files of 63 to 100 kB
SHARDS = sorted(p.name for p in SOURCE.glob("*.safetensors"))
ALL_BYTES = sum((SOURCE / name).stat().st_size for name in SHARDS)
NAME = "baidu/ERNIE-tiny-Paddle"
ADDRESS = f"hf://{NAME}"
SMALL = 60_000  # bytes per file: four files; the first and the last need the same file of the source
INT4 = built_in.one_codec("wint4", RoundToNearest(4, 32), experts_only=False, mtp=False, keep_unfit=False)
CHUNK = 1 << 12  # bytes; what a broken connection may lose
TELLING_THE_SOURCE = {"README.md", "SHA256SUMS", "ernie-quant.json"}  # files
real_sleep = time.sleep
# the client uploads with a deprecated argument of its own HTTP library
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


def files_of(cache: Path) -> list[Path]:
    """Weight files, or parts of some, that lie in the cache."""
    return [p for folder in cache.glob("*/*/**/files") for p in folder.rglob("*") if p.is_file()]


def same_result(out: Path, local: dict[str, bytes]) -> bool:
    """Every file but those that say where the source was."""
    found = contents(out)
    return found.keys() == local.keys() and all(found[n] == local[n] for n in found.keys() - TELLING_THE_SOURCE)


@contextmanager
def watched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that lie in the cache after every piece of a download and every slab."""
    found, before = [0], download.HubDownload._pause

    def look(self: download.HubDownload, seconds: float) -> None:
        sizes = []
        for path in files_of(cache):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # renamed while we looked
                continue
        found.append(sum(sizes))
        before(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(download.HubDownload, "_pause", look)
        yield found


def run_with(plan: Plan, out: Path, **options: Any) -> RunResult:
    return run_plan(plan, out, disk_budget=least_budget(plan), workers=1, **options)
