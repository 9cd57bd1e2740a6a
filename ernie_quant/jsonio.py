"""JSON that a stranger wrote: small enough, an object, and one line of error otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError

MAX_BYTES = 64 << 20  # the index of the 424B has 1.3 MB


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path.name}: {path.stat().st_size} bytes are too many for a JSON file of a model")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could be read, but never written again
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from error
    except RecursionError:
        raise CheckpointError(f"{path.name}: is nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{path.name}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: is not a JSON object")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:40])


def dumps(value: Any) -> str:
    """JSON as this project writes it: the same text for the same value."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
