"""report.html: what a run did to every tensor, as one file that needs a browser and nothing else.

The names in it are a stranger's: the page is fixed text and one block of JSON without a single `<`, its policy allows no
address, and its scripts make text of strings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ernie_quant.disk import write_file
from ernie_quant.errors import OutputError
from ernie_quant.report.columns import columns
from ernie_quant.report.saved import Report

PAGES = Path(__file__).parent / "pages"
OF_TEXT = "calibration.js"  # of calibrated results alone
SCRIPTS = ("data.js", "tables.js", "bars.js", "histogram.js", "heatmap.js", OF_TEXT, "main.js")


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    path: Path
    bytes: int


def write(report: Report, path: Path) -> Written:
    """Write the page. Raises OutputError."""
    return put(path, render(report))


def put(path: Path, data: bytes) -> Written:
    """Write a file whole or not at all. Raises OutputError."""
    try:
        write_file(path, data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    return Written(path, len(data))


def render(report: Report) -> bytes:
    """The page: the same report, the same bytes."""
    style = (PAGES / "report.css").read_text(encoding="utf-8")
    shown = columns(report)
    scripts = [name for name in SCRIPTS if name != OF_TEXT or "calibration" in shown]
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
    html = (PAGES / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], html).encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
