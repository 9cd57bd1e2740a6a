"""Small results of calibrated quantization, in a second each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.models import GOLDEN, copy, invoke
from helpers.words import byte_tokenizer

TOKENS = 512  # one window to fit to, and one to judge by


def book(folder: Path) -> Path:
    """A text of more than 2000 tokens."""
    file = folder / "book.txt"
    file.write_text("".join(f"{n} is {'odd' if n % 2 else 'even'} and {n * n}.\n" for n in range(200)))
    return file


def worded(folder: Path, family: str = "moe", layout: str = "paddle") -> Path:
    """A golden model with a tokenizer of bytes."""
    return byte_tokenizer(copy(GOLDEN / family / layout, folder))


def calibrated(source: Path, out: Path, *options: Any, command: str = "wint4", method: str = "nearest") -> Path:
    """Its experts in 4 bits (or as `options` say), by the text beside it."""
    text = source.with_name("book.txt")
    if not text.exists():
        book(source.parent)
    options = options or ("--experts-only", "--group-size", 32, "--fit")
    by = ("--calibration", text, "--calibration-tokens", TOKENS, "--method", method, "--quiet")
    invoke(command, source, out, *options, *by)
    return out
