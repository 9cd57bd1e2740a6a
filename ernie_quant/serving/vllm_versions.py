"""Versions of vLLM in which WINT2 is served. vLLM promises nothing of what a plug-in needs, and changes it."""

from __future__ import annotations

import re

from ernie_quant.errors import NeedsError
from ernie_quant.runtimes._wint2 import VLLM_READ as READ
from ernie_quant.runtimes._wint2 import VLLM_RUN as RUN
from ernie_quant.runtimes._wint2 import vllm_versions


def refuse_unknown(version: str) -> None:
    """Raises NeedsError where `version` (0.32.0, 0.33.1rc2+cu130) is none of RUN and READ."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) in RUN + READ:
        return
    (low, *_), (*_, high) = sorted(RUN + READ), sorted(RUN + READ)
    raise NeedsError(
        f"vLLM {version} was not tried with WINT2 experts; this ernie-quant serves them in {vllm_versions()}:"
        f" pip install 'vllm>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}', or a newer ernie-quant"
    )
