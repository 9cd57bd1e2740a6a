"""max_hours: whatever a night is busy with when its time ends, it stops there, and the next night goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, files_of, uploads
from helpers.models import random_model
from helpers.nights import WINT4, Night, statuses
from helpers.ranks import WIDTHS

from ernie_quant import disk, threads
from ernie_quant.nightly import run as nightly
from ernie_quant.sources import open_source

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures", "no_waiting_for_the_disk")]
RANKS = '[[target]]\nrepo = "me/tiny-tp2"\nrecipe = "wint2"\nwint4_layers = 2\neffort = 1\ntp = 2\nmax_shard_size = "500kB"\n'
OVER = "max_hours have passed; the next run goes on where this one stopped"


@pytest.fixture
def cut_short(night: Night, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A night whose clock jumps once `over` is true: it must end as one whose time has passed."""

    def call(over: Callable[[], bool], *targets: str, **options: Any) -> None:
        clock = SimpleNamespace(monotonic=lambda: 1e6 if over() else 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(nightly, "time", clock)
            found = night(*targets, more="[limits]\nmax_hours = 1\n", **options)
        assert (found.exit_code, statuses(found), found.targets[0].error) == (75, ["retry"], OVER)

    return call


def test_while_ranks_are_shared(night: Night, cut_short: Callable[..., None], hub: LoopbackHub, tmp_path: Path) -> None:
    hub.put("baidu/wide", random_model(tmp_path / "src", "paddle", "moe_mtp", **WIDTHS))
    place, source = night.place(RANKS), "hf://baidu/wide"
    cut_short(lambda: bool(list(place.glob("rank0/*.safetensors"))), RANKS, source=source)
    ranks = [p.parent.name for p in place.rglob("rank?/*.safetensors")]
    assert set(ranks) == {"rank0"}  # the second was not begun
    assert statuses(night(RANKS, source=source)) == ["published"]


def test_while_finished_files_are_hashed(night: Night, cut_short: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    place = night.place(WINT4)
    cut_short(lambda: len(list(place.glob("*.safetensors"))) == 3, WINT4)
    monkeypatch.setattr(disk, "CHUNK", 1000)
    hashed = Counted(monkeypatch)
    cut_short(lambda: hashed.pieces > 10, WINT4)
    assert hashed.pieces == 11
    assert statuses(night(WINT4)) == ["published"]
    assert next(e for e in night.events if e["event"] == "made")["files_before"] == 3


def test_while_a_result_is_verified(
    night: Night, cut_short: Callable[..., None], monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub
) -> None:
    monkeypatch.setattr(disk, "CHUNK", 1000)
    hashed = Counted(monkeypatch)
    cut_short(lambda: hashed.pieces > 10, WINT4)
    assert [e["event"] for e in night.events if e["event"] != "file"] == ["source", "target", "made", "result", "end"]
    assert "me/tiny-wint4" not in hub.store.repos
    assert statuses(night(WINT4)) == ["published"]


def test_while_a_file_of_the_source_is_on_its_way(
    night: Night, cut_short: Callable[..., None], hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "TICK", 0.05)
    open_source(ADDRESS)  # its headers come quickly
    slow = hub.slow(path="^/lfs/", bytes_per_second=5_000)  # twenty seconds for the first file
    began = time.monotonic()
    cut_short(lambda: bool(files_of(tmp_path / "cache")), WINT4)
    assert time.monotonic() - began < 8
    slow.times = 0
    assert statuses(night(WINT4)) == ["published"]


class Counted:
    """Pieces of files that were hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces = 0
        real = disk.hashlib.sha256

        def sha256(data: bytes = b"") -> Any:
            digest = real(data)
            return SimpleNamespace(update=lambda piece: self.hear(digest.update, piece), hexdigest=digest.hexdigest)

        monkeypatch.setattr(disk, "hashlib", SimpleNamespace(sha256=sha256))

    def hear(self, update: Callable[[bytes], None], piece: bytes) -> None:
        self.pieces += 1
        update(piece)
