"""What a git clone without git-lfs leaves in place of large files: pointers, a few lines of text.

Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from pathlib import Path

FIRST, MOST = b"version https://git-lfs.github.com/spec/", 1024  # how one begins, and how long it may be
FETCH = "`git lfs install` and `git lfs pull` in its folder fetch what is meant"
SHOWN = 3


def is_pointer(path: Path) -> bool:
    """Is it one? No link is followed, and nothing is opened that is too long."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or not len(FIRST) < found.st_size <= MOST:
            return False
        with open(path, "rb") as file:
            return file.read(len(FIRST)) == FIRST
    except OSError:
        return False


def words(names: Collection[str]) -> str:
    """`a, b, c and 7 more: Git LFS pointers, not the files themselves`, and what to do."""
    first = ", ".join(list(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    what = "a Git LFS pointer, not the file itself" if len(names) == 1 else "Git LFS pointers, not the files themselves"
    return f"{first}: {what}; {FETCH}"
