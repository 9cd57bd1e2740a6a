"""Files of a run that would fill the page cache leave it; those of a smaller one stay for whoever reads them next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.runs import INT4, SOURCE, planned

from ernie_quant import disk
from ernie_quant.run import whole
from ernie_quant.run.whole import run_plan

PAGE = 4096


def cached(path: Path) -> bool:
    """Is its first page in memory? Asked without reading it from disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return _read_at_once(fd)
    finally:
        os.close(fd)


def _read_at_once(fd: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


@pytest.fixture(autouse=True)
def _can_be_told(tmp_path: Path) -> None:
    """A file of this file system leaves the cache when it is asked to, and that is seen."""
    if not (hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")):
        pytest.skip("this system does not take advice on files, or does not tell what is in memory")
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(PAGE))
    with open(probe, "rb") as file:
        os.fsync(file.fileno())
        try:
            before = _read_at_once(file.fileno())
        except OSError:
            pytest.skip("this file system does not tell what is in memory")
        disk.leave_cache(file.fileno())
        if not before or _read_at_once(file.fileno()):
            pytest.skip("files of this file system are always in memory")


@pytest.mark.parametrize("large", [True, False])
def test_files_of_a_large_run_leave_the_cache(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for file in SOURCE.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    os.sync()
    monkeypatch.setattr(whole, "crowds", lambda nbytes: large)
    run_plan(planned(source, INT4), tmp_path / "out")
    weights = [*source.glob("*.safetensors"), *(tmp_path / "out").glob("*.safetensors")]
    assert {cached(path) for path in weights} == {not large}


def test_half_of_the_memory_is_what_files_may_take() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert disk.crowds(memory)
    assert not disk.crowds(memory // 3)
