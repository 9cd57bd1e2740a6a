"""Sizes as people write them."""

from __future__ import annotations

UNITS = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}


def parse_size(value: object) -> int:
    """Bytes: `5GB`, `500MB`, `2GiB` or a plain number. Raises ValueError."""
    if type(value) is int and value > 0:
        return value
    text = str(value).strip().upper()
    unit = next(u for u in UNITS if text.endswith(u))
    try:
        size = int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"{value!r} is not a size such as 5GB or 500MB")
    return size
