"""A disk that nobody waits for, and what lies on it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def no_waiting() -> Iterator[None]:
    """Files are not synchronised with the disk, which takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        yield


def contents(folder: Path, but: Collection[str] = ()) -> dict[str, bytes]:
    """Every file below a folder, state included."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: p.read_bytes() for p in files if (name := p.relative_to(folder).as_posix()) not in but}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files were written when: a file that is written again gets another inode."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}
