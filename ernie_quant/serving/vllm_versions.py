"""Versions of vLLM in which WINT2 is served. vLLM promises nothing of what a plug-in needs, and changes it."""

from __future__ import annotations

import re

from ernie_quant.errors import NeedsError

RUN, READ = ((0, 32),), ((0, 33),)  # RUN: `make test-vllm`; READ: the same calls in its sources


def refuse_unknown(version: str) -> None:
    """Raises NeedsError where `version` (0.32.0, 0.33.1rc2+cu130) is none of RUN and READ."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) in RUN + READ:
        return
    (low, *_), (*_, high) = sorted(RUN + READ), sorted(RUN + READ)
    raise NeedsError(
        f"vLLM {version} was not tried with WINT2 experts; this ernie-quant serves them in {_dotted(low)} to {_dotted(high)}:"
        f" pip install 'vllm>={_dotted(low)},<{high[0]}.{high[1] + 1}', or a newer ernie-quant"
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
