"""Freed slabs go back to the system at once: whatever works on many of them asks the C library for that first."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import GOLDEN, write  # and with them torch, whose own loading of libraries is not to be watched

Command = Callable[..., tuple[int, str, str]]
SOURCE = GOLDEN / "moe/pt"
WANTED = [(-3, 4 << 20), (-1, 16 << 20)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD

# the number of blocks, of so many MiB, that are mapped for themselves, so that freeing them unmaps them
SCRIPT = """
import ctypes, sys
from ernie_quant.run.memory import return_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keep".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info

def mapped(mib):
    before = libc.mallinfo2().hblks
    block = libc.malloc(mib << 20)
    count = libc.mallinfo2().hblks - before
    libc.free(block)
    return count

if sys.argv[1] == "asked":
    return_freed_memory()
print(mapped(20), mapped(8), mapped(2))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc, or one before 2.33")
@pytest.mark.parametrize(("how", "expected"), [("left alone", "1 0 0"), ("asked", "1 1 0")])
def test_blocks_of_4_mib_and_more_are_mapped_whatever_was_freed_before(how: str, expected: str) -> None:
    """Left alone, glibc takes 20 freed MiB for a reason to keep blocks of 8 in its heap."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def replace_mallopt(monkeypatch: pytest.MonkeyPatch, found: Callable[[], Any]) -> None:
    """What ctypes finds under that name; the true one would change the memory of all tests that follow."""

    class Library(ctypes.CDLL):
        def __getattr__(self, name: str) -> Any:
            return found() if name == "mallopt" else super().__getattr__(name)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Calls of mallopt."""
    calls: list[tuple[int, int]] = []
    replace_mallopt(monkeypatch, lambda: lambda *given: calls.append(given))
    return calls


@pytest.mark.parametrize("words", [("convert", "--to", "pt"), ("wint8", "--group-size", 32)], ids=lambda words: words[0])
def test_a_command_that_writes_asks_for_it(
    words: tuple[object, ...], asked: list[tuple[int, int]], command: Command, tmp_path: Path
) -> None:
    name, *options = words
    assert command(name, SOURCE, tmp_path / "out", *options)[0] == 0
    assert asked == WANTED


def test_verify_asks_for_it(asked: list[tuple[int, int]], command: Command, tmp_path: Path) -> None:
    write(SOURCE, tmp_path / "out")
    assert asked == []  # a program that imports the package decides for itself
    assert command("verify", tmp_path / "out")[0] == 0
    assert asked == WANTED


def test_the_nightly_job_asks_for_it(asked: list[tuple[int, int]], command: Command, tmp_path: Path) -> None:
    """This one ends at its source, which is not there: that is after it has asked, and before any hub."""
    job = tmp_path / "job.toml"
    job.write_text(f'[source]\nrepo = "{tmp_path}/nowhere"\n[[target]]\nrepo = "me/x"\nrecipe = "pt"\n')
    code, out, err = command("nightly", job, "--work", tmp_path / "work")
    assert (code, out) == (1, "")
    assert f"{tmp_path}/nowhere" in err
    assert asked == WANTED


def test_a_c_library_that_has_no_such_thing_is_no_reason_to_stop(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise AttributeError("undefined symbol: mallopt")

    replace_mallopt(monkeypatch, missing)
    assert command("convert", SOURCE, tmp_path / "out", "--to", "pt")[0] == 0
