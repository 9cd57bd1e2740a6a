"""report.html: what a run did to every tensor, as one file that needs a browser and nothing else.

The names in it are a stranger's: the page is fixed text and one block of JSON without a single `<`, its policy allows no
address, and its scripts make text of strings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant.disk import write_file
from ernie_quant.errors import OutputError
from ernie_quant.reporting.columns import columns
from ernie_quant.reporting.compared import compared
from ernie_quant.reporting.saved import Report

PAGES = Path(__file__).parent / "pages"
OF_TEXT = "calibration.js"  # of calibrated results alone
ALWAYS = ("base.js", "table.js", "data.js", "made.js")
PICTURES = ("bars.js", "codecs.js", "histogram.js", "panels.js", "scales.js", "heatmap.js", "tip.js")
SCRIPTS = (*ALWAYS, "tensors.js", *PICTURES, OF_TEXT, "main.js")
OF_TWO = (*ALWAYS, "compare.js", "curves.js", "main_of_two.js")


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    path: Path
    bytes: int


def write(report: Report, path: Path, against: Report | None = None) -> Written:
    """Write the page of a result, or of two side by side. Raises OutputError."""
    return put(path, render(report) if against is None else render_two(report, against))


def put(path: Path, data: bytes) -> Written:
    """Write a file whole or not at all. Raises OutputError."""
    try:
        write_file(path, data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    return Written(path, len(data))


def render(report: Report) -> bytes:
    """The page: the same report, the same bytes."""
    shown = columns(report)
    return filled("report.html", [name for name in SCRIPTS if name != OF_TEXT or "calibration" in shown], shown)


def render_two(report: Report, against: Report) -> bytes:
    """The page of two results side by side. Raises OutputError where they have no tensor in common."""
    return filled("compare.html", OF_TWO, compared(report, against))


def filled(template: str, scripts: Sequence[str], shown: Mapping[str, Any]) -> bytes:
    """A page with its scripts and data in it."""
    style = (PAGES / "report.css").read_text(encoding="utf-8")
    script = "\n".join((PAGES / name).read_text(encoding="utf-8") for name in scripts)
    data = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    values = {
        # no address is allowed but data:, which the empty icon has; browsers would ask a server for one
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
        " base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    html = (PAGES / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], html).encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
