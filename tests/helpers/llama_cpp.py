"""The real llama.cpp of `benchmarks/llama_cpp.py`, and the mark of tests that need it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from llama_cpp import Ggml, Llama, Refused, library

__all__ = ["Ggml", "Llama", "Refused", "needs_llama_cpp"]


def _missing() -> str:
    try:
        library()
    except OSError as error:
        return str(error)
    return ""


MISSING = _missing()
if MISSING and os.environ.get("CI"):
    raise RuntimeError(f"in CI llama.cpp must be there: {MISSING}")
needs_llama_cpp = pytest.mark.skipif(bool(MISSING), reason=MISSING)
