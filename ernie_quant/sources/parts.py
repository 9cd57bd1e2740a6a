"""GGUF files of a folder as models, by their names: one file, or `PREFIX-00001-of-00003.gguf` and so on.

Source: ggml-org/llama.cpp, src/llama.cpp (llama_split_path).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

GGUF = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)
NO_MODELS = ("*mmproj*", "*imatrix*")  # a model's eyes, and what quantization was told: in small letters


@dataclass(frozen=True)
class Model:
    """The files of one that are there, in order, and how many there should be."""

    files: tuple[str, ...]
    promised: int = 1

    @property
    def title(self) -> str:
        """What it is opened by."""
        return self.files[0]

    @property
    def words(self) -> str:
        """For a note."""
        return self.title if len(self.files) == 1 else f"{self.title} and {len(self.files) - 1} more"

    @property
    def missing(self) -> list[str]:
        """Names of the parts that are not there."""
        found = PART.fullmatch(self.title)
        if found is None or len(self.files) == self.promised:
            return []
        there, numbers = set(self.files), range(1, self.promised + 1)
        return [name for number in numbers if (name := f"{found[1]}-{number:05d}-of-{found[3]}{GGUF}") not in there]


def number_of(name: str) -> int:
    """Of a part; 1 for a file that is whole."""
    found = PART.fullmatch(name)
    return int(found[2]) if found and _promised(name) > 1 else 1


def model_with(name: str, names: Iterable[str]) -> Model:
    """The one that a file is of, or is part of, among `names`."""
    if _promised(name) == 1:
        return Model((name,))
    return next(model for model in _all(names) if name in model.files)


def models(names: Iterable[str]) -> list[Model]:
    """All among `names`, without files that are made for a model and are none."""
    found = _all(name for name in names if name.endswith(GGUF))
    return [model for model in found if not any(fnmatchcase(model.title.lower(), odd) for odd in NO_MODELS)]


def _all(names: Iterable[str]) -> list[Model]:
    sets: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        found, promised = PART.fullmatch(name), _promised(name)
        sets.setdefault((found[1] if found and promised > 1 else name, promised), []).append(name)
    return [Model(tuple(files), promised) for (_, promised), files in sets.items()]


def _promised(name: str) -> int:
    """Of how many parts one is; 1 where the name counts none, or wrongly."""
    found = PART.fullmatch(name)
    return int(found[3]) if found and 1 <= int(found[2]) <= int(found[3]) else 1
