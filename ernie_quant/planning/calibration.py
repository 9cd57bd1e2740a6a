"""What text a result is calibrated on: as somebody asks for it, and as settings that its bytes depend on.

# in a recipe, beside its rules; in a nightly job it is [target.calibration]
[calibration]
text = "auto"                    # or files: ["handbook.txt", "chats.jsonl"], as seen from the folder of this file
tokens = 16384
seed = 0
method = "descent"
fit = false
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant.settings import Settings

AUTO = "auto"  # the texts that come with the package
METHODS = ("nearest", "feedback", "descent")  # what codecs make of it
VERSION = 1  # raised whenever the same text makes other codes
TOKENS, SEED, METHOD = 16384, 0, "descent"
LEAST_TOKENS, MOST_TOKENS = 512, 1 << 24


@dataclass(frozen=True)
class Asked:
    """What somebody wants. `text`: AUTO or files."""

    text: tuple[Path, ...] | str
    tokens: int = TOKENS
    seed: int = SEED
    method: str = METHOD
    fit: bool = False


@dataclass(frozen=True)
class Calibration:
    """`source`: AUTO or files; `sha256`: of these texts, by name. `fit`: o_proj and shared down_proj may change, too.

    `method` is for people: the codecs of the recipe have it.
    """

    source: tuple[Path, ...] | str
    sha256: Mapping[str, str]
    tokens: int = TOKENS
    seed: int = SEED
    fit: bool = False
    method: str = METHOD

    @property
    def name(self) -> str:
        """What people call the text."""
        return AUTO if isinstance(self.source, str) else ", ".join(self.sha256)

    def shown(self) -> dict[str, Any]:
        """For programs that ask what will be done."""
        return {"name": self.name, "sha256": dict(self.sha256), **self._numbers, "method": self.method}

    @property
    def _numbers(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seed": self.seed, "fit": self.fit}

    def as_dict(self) -> dict[str, Any]:
        """As it stands in an identity: texts by their hashes, wherever they lie."""
        return {"texts": dict(self.sha256), **self._numbers, "version": VERSION}


def read(table: Settings, beside: Path) -> Asked:
    """A table of a file in the folder `beside`; mistakes are noted in it."""
    text = _text(table, beside)
    tokens, seed = table.take("tokens", int, TOKENS), table.take("seed", int, SEED)
    method, fit = table.take("method", str, METHOD), table.take("fit", bool, False)
    if not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        table.wrong(f"tokens is {tokens}, not from {LEAST_TOKENS} to {MOST_TOKENS}")
    if method not in METHODS:
        table.wrong(f"method is {method!r}, not {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    table.end()
    return Asked(text, tokens, seed, method, fit)


def _text(table: Settings, beside: Path) -> tuple[Path, ...] | str:
    """`auto`, or files that are there."""
    text = table.pop("text")
    if text == AUTO:
        return AUTO
    if text is None:
        table.wrong(f'text is missing: "{AUTO}" or a list of files')
        return AUTO
    if not isinstance(text, list) or not text or not all(isinstance(file, str) for file in text):
        table.wrong(f'text is {text!r}, not "{AUTO}" or a list of files')
        return AUTO
    files = tuple(beside / file for file in text)
    for file in files:
        if not file.is_file():
            table.wrong(f"text: {file} is no file")
    return files
