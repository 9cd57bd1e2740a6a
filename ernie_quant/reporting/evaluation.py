"""The JSON result of an evaluation, as `eval --json` and `--save` give it: as a table for people, and read back from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_quant.errors import OutputError, line_of
from ernie_quant.jsonio import read_object
from ernie_quant.reporting.tables import table

EVALUATED = "evaluated"
# key of a row -> head of its column
ALONE = {"perplexity": "perplexity"}
COMPARED = {
    "source_perplexity": "perplexity of the source", "perplexity": "of this", "kl": "KL", "kl_99": "99% of KL below",
    "same_top": "same top token",
}  # fmt: skip


def read(file: Path) -> dict[str, Any]:
    """A kept result. Raises OutputError for another file, CheckpointError for one that cannot be read."""
    value = read_object(file)
    try:
        if value["status"] != EVALUATED or not isinstance(value["result"]["fingerprint"], str):
            raise KeyError
        text(value)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise OutputError(f"{file}: is no result of eval (--save)") from None
    return value


def text(value: Mapping[str, Any]) -> str:
    """A row for each text and one for all of them."""
    head, lines, note = columns(value)
    return f"{table(head, lines)}\n\n{note}"


def columns(value: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Head and rows of its table, and what the errors in it are."""
    keys = ALONE if value["source"] is None else COMPARED
    rows = [*value["rows"], *([value["together"]] if len(value["rows"]) > 1 else [])]
    lines = [(line_of(row["name"]), str(row["tokens"]), *(number(row[key]) for key in keys)) for row in rows]
    windows = int(value["rows"][0]["windows"])
    each = f"{windows} windows of {value['window']} tokens a text"
    over = each if windows > 1 else "tokens, which are correlated (one window)"
    rounded = "".join(f"; {line_of(said)}" for said in (value["result"].get("integers"),) if said)
    return ("text", "tokens", *keys.values()), lines, f"± one standard error, over {over}{rounded}"


def number(estimate: Mapping[str, float | None]) -> str:
    """`24.98 ± 1.74`: the error in two digits, and the value in four or as many as it has."""
    value, error = estimate["value"], estimate["window_error"]
    error = estimate["token_error"] if error is None else error
    if value is None or not error:
        return "-" if value is None else f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)), 3 - math.floor(math.log10(abs(value) or 1)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
