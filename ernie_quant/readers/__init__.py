"""Headers without data, one file per format: `SUFFIXES` and `read_header(path) -> list[TensorRef]`.

A reader calls nothing that a file names, allocates nothing that a file claims before checking it against the
file's size, and raises CheckpointError with the file's name.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from ernie_quant import plugins
from ernie_quant.checkpoint import TensorRef
from ernie_quant.errors import CheckpointError

MAX_NAME = 500  # characters; those of the models have less than 100


@cache
def by_suffix() -> dict[str, ModuleType]:
    """Suffix of a weight file -> the reader for it."""
    return {suffix: module for module in plugins.modules(sys.modules[__name__]) for suffix in module.SUFFIXES}


def read_header(path: Path) -> list[TensorRef]:
    """The tensors of one file. Raises CheckpointError."""
    reader = by_suffix().get(path.suffix)
    if reader is None:
        raise CheckpointError(f"{path.name}: not a weight file ({', '.join(sorted(by_suffix()))})")
    try:
        refs: list[TensorRef] = reader.read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from error
    if long := next((ref for ref in refs if len(ref.name) > MAX_NAME), None):
        raise CheckpointError(f"{path.name}: holds a tensor whose name has {len(long.name)} characters: {long.name[:200]!r}")
    return refs


def read_keys(path: Path) -> dict[str, object]:
    """The keys and values of a GGUF file, which say what other formats have in files beside them. Raises CheckpointError."""
    from ernie_quant.readers import gguf

    try:
        return gguf.read_keys(path)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from error
