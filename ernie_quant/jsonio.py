"""JSON that a stranger wrote: small enough, without doubles, and one line of error otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError

# Together they keep the memory of parsing below 0.5 GB, whatever a text holds; see tests/readers/test_bounds.py.
MAX_BYTES = 32 << 20  # the index of the 424B has 1.3 MB; a header of 150,000 tensors 18 MB
MAX_VALUES = 1_250_000  # eight per tensor of a header
MAX_DEPTH = 64  # far below what recursion allows, so that whoever walks the value later may recurse


def parse(raw: bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError, with what the text is instead.

    NaN and infinities are no JSON, but Python writes them: with `finite` off they pass.
    """
    if len(raw) > MAX_BYTES:
        raise ValueError(f"too large: more than {MAX_BYTES} bytes")
    # every value but the first follows one of these; those inside of strings are counted too, which only errs upwards
    if (values := raw.count(b",") + raw.count(b"[") + raw.count(b"{")) > MAX_VALUES:
        raise ValueError(f"too large: {values} values, {MAX_VALUES} are allowed")
    try:
        number, constant = (_finite, _refuse) if finite else (float, float)
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=constant, parse_float=number)
        deep = _is_deep(value)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if deep:
        raise ValueError("nested too deep")
    return value


def read_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in `path`; without NaN and infinities, unless `finite` is off. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            value = parse(file.read(MAX_BYTES + 1), finite=finite)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name}: is {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: is not a JSON object")
    return value


def finite_only(value: Any) -> Any:
    """`value` without the entries of its objects that are NaN or an infinity, or lists with one: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: finite_only(inner) for key, inner in value.items() if not _is_odd(inner)}
    return value


def not_finite(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The entries that `finite_only` leaves out: `vision_config.x` and its value."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from not_finite(value, f"{path}{key}.")
        elif _is_odd(value):
            yield f"{path}{key}", value


def _is_odd(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_odd(item) or (isinstance(item, dict) and any(not_finite(item))) for item in value)
    return isinstance(value, float) and not math.isfinite(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        for name, _ in pairs:
            if name not in table:
                raise ValueError(f"duplicate key {name[:200]!r}")
            del table[name]
    return table


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:40])


def _is_deep(value: Any) -> bool:
    """Are there more than MAX_DEPTH levels? Raises ValueError for a lone surrogate: it could be read, but never written again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return False
        level = below
    return True


def dumps(value: Any) -> str:
    """JSON as this project writes it: the same text for the same value."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
