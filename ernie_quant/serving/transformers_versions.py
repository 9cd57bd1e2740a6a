"""Is there a version of transformers whose loader our quantizer was tried in? Without importing it, for that takes seconds."""

from __future__ import annotations

import re
from importlib import metadata

from ernie_quant import needs
from ernie_quant.errors import NeedsError
from ernie_quant.runtimes._transformers import IMPORT, NEWEST, OLDEST, versions


def check() -> None:
    """Raises NeedsError, in one line, for none or another."""
    needs.require("torch", "transformers", "compressed_tensors")
    there = metadata.version("transformers")
    found = tuple(map(int, re.findall(r"\d+", there)[:2]))
    if not OLDEST <= found <= NEWEST:
        wanted = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
        raise NeedsError(
            f"{IMPORT}: was tried with transformers {versions()}, not with {there}, whose loader may be another:"
            f" pip install '{wanted}'"
        )
