"""report.html: what a run did to every tensor, as one file that needs a browser and nothing else.

The page holds the rows of report.json as columns. Tensors that differ only in the numbers in their names (and in their
errors) are one series, so that 54 layers of 128 experts take half a megabyte. Names are a stranger's: the page is
fixed text and one block of JSON without a single `<`, its policy allows no address, and its scripts make text of strings.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant.codecs.keep import KEPT
from ernie_quant.disk import write_file
from ernie_quant.errors import OutputError, line_of
from ernie_quant.jsonio import read_object
from ernie_quant.paths import MANIFEST
from ernie_quant.report.rows import FILENAME, TensorReport, layer_of, total

PAGES = Path(__file__).parent / "pages"
SCRIPTS = ("data.js", "tables.js", "bars.js", "histogram.js", "heatmap.js", "main.js")
DIGITS = 4  # significant ones
MOST = 2**60  # of bytes or weights, and 10**100 of a sum: above, a report is not believed
ID = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")


@dataclass(frozen=True)
class Report:
    """What report.json and the manifest of a result say."""

    name: str  # of the folder
    rows: tuple[TensorReport, ...]
    header: Mapping[str, Any]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """What the name of a tensor says: `parts` with `ids` between them, which of the ids is what, and the projection."""

    parts: tuple[str, ...]
    ids: tuple[int, ...]
    layer: int | None  # index in `ids`
    expert: int | None
    block: str  # what the layer belongs to: "layer", "MTP"
    projection: str

    @staticmethod
    def of(name: str) -> Place:
        """Take a name apart."""
        pieces = ID.split(name)
        parts, ids = tuple(pieces[::2]), tuple(map(int, pieces[1::2]))
        before = {part.rpartition(".")[0].rpartition(".")[2]: i for i, part in enumerate(parts[:-1])}
        layer = next((before[word] for word in ("layers", "mtp_block") if word in before), None)
        end = parts[-1].removesuffix(".weight").strip(".")
        block = "MTP" if "layers" not in before else "layer"
        return Place(parts, ids, layer, before.get("experts"), block, end or name)


def read(out: Path) -> Report:
    """The report of a finished result. Raises OutputError or CheckpointError."""
    for file in (MANIFEST, FILENAME):
        if not (out / file).is_file():
            raise OutputError(f"{out}: has no {file}; a report is made from the folder of a finished result")
    header, manifest = read_object(out / FILENAME), read_object(out / MANIFEST)
    tensors = header.pop("tensors", None)
    if not isinstance(tensors, list) or not tensors:
        raise OutputError(f"{out / FILENAME}: lists no tensors")
    rows = []
    for number, value in enumerate(tensors, 1):
        try:
            rows.append(_believed(TensorReport.from_json(value)))
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{out / FILENAME}: tensor {number} is not as a run writes it: {error}") from None
    return Report(out.resolve().name, tuple(rows), header, manifest)


def _believed(row: TensorReport) -> TensorReport:
    """The row, if its values have the types and sizes that a run gives them. Raises ValueError."""
    for key in ("name", "role", "codec"):
        if not isinstance(getattr(row, key), str):
            raise ValueError(f"{key} is no text")
    wholes = (row.bytes, *row.shape)
    if len(row.shape) > 8 or any(type(n) is not int or not 0 <= n <= MOST for n in wholes) or math.prod(row.shape) > MOST:
        raise ValueError("bytes or shape are no such numbers")
    for key in ("bits_per_weight", "rel_error", "max_abs_error", "squared_error", "squared_norm"):
        value = getattr(row, key)
        if type(value) not in (int, float) or not 0 <= value <= 1e100:
            raise ValueError(f"{key} is no such number")
    return row


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    path: Path
    bytes: int


def write(found: Report, path: Path) -> Written:
    """Write the page. Raises OutputError."""
    return put(path, render(found))


def put(path: Path, data: bytes) -> Written:
    """Write a file whole or not at all. Raises OutputError."""
    try:
        write_file(path, data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    return Written(path, len(data))


def render(found: Report) -> bytes:
    """The page: the same report, the same bytes."""
    style = (PAGES / "report.css").read_text(encoding="utf-8")
    script = "\n".join((PAGES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    data = json.dumps(columns(found), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    values = {
        # no address is allowed but data:, which the empty icon has; browsers would ask a server for one
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
        " base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    html = (PAGES / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], html).encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def columns(found: Report) -> dict[str, Any]:
    """All that the page shows, as small as plain JSON can say it."""
    by_codec, by_role = _groups(found.rows, lambda r: r.codec), _groups(found.rows, lambda r: r.role)
    names = sorted(by_codec, key=lambda name: (name != KEPT, total(by_codec[name]).bits_per_weight, name))
    codecs, roles = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(by_role)}
    layers = _groups(found.rows, lambda r: layer_of(r.name))
    return {
        "facts": _facts(found),
        "codecs": [line_of(name) for name in codecs],
        "roles": [line_of(name) for name in roles],
        "by_role": [_sums(group, codecs) for group in by_role.values()],
        "by_layer": [{"name": line_of(name), **_sums(layers[name], codecs)} for name in sorted(layers, key=_layers_first)],
        "series": _series(found.rows, roles, codecs),
    }


def _groups(rows: Iterable[TensorReport], key: Callable[[TensorReport], str]) -> dict[str, list[TensorReport]]:
    groups: dict[str, list[TensorReport]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _layers_first(name: str) -> tuple[bool, int]:
    """The layers by number; all else keeps its order."""
    found = re.fullmatch(r"layer ([0-9]{1,6})", name)
    return (not found, int(found[1]) if found else 0)


def _facts(found: Report) -> dict[str, Any]:
    everything, changed = total(found.rows), total([row for row in found.rows if row.changed])
    source, recipe = _object(found.manifest.get("source")), _object(found.manifest.get("recipe"))
    files = [_object(file) for file in _object(source.get("files")).values()]
    weight_files = [file["bytes"] for file in files if "header" in file and type(file.get("bytes")) is int]
    rules = map(_object, _list(recipe.get("rules")))
    return {
        "name": line_of(found.name),
        "source": _text(found.manifest.get("source_name")),
        "revision": _text(source.get("revision")),
        "version": _text(found.manifest.get("version")),
        "recipe": _text(found.header.get("recipe")),
        "rules": [[_text(rule.get("applies_to")), _text(rule.get("codec"))] for rule in rules],
        "runtime": _text(found.header.get("runtime")),
        "notes": [_text(note) for note in _list(found.header.get("notes"))],
        "source_bytes": max(0, sum(weight_files)),
        "bytes": everything.bytes,
        "weights": everything.weights,
        "tensors": everything.tensors,
        "changed": changed.tensors,
        "bits": _short(everything.bits_per_weight),
        "error": _short(changed.rel_error) if changed.tensors else None,
    }


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return line_of(value) if isinstance(value, str) else ""


def _sums(group: Sequence[TensorReport], codecs: Mapping[str, int]) -> dict[str, Any]:
    """One line of a table; the errors are those of the tensors that changed."""
    changed = [row for row in group if row.changed]
    everything, lossy = total(group), total(changed)
    weights: dict[str, int] = {}
    for row in changed:
        weights[row.codec] = weights.get(row.codec, 0) + math.prod(row.shape)
    return {
        "tensors": everything.tensors,
        "changed": lossy.tensors,
        "weights": everything.weights,
        "bytes": everything.bytes,
        "bits": _short(everything.bits_per_weight),
        "error": _short(lossy.rel_error) if changed else None,
        "worst": _short(lossy.worst) if changed else None,
        "codecs": [codecs[codec] for codec in sorted(weights, key=lambda c: (-weights[c], c))],
    }


def _series(rows: Sequence[TensorReport], roles: Mapping[str, int], codecs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tensors alike: what they share once, and a column of each of the ids in their names and of their errors."""
    alike: dict[tuple[Any, ...], list[tuple[Place, TensorReport]]] = {}
    for row in rows:
        place = Place.of(line_of(row.name))
        key = (place.parts, row.role, row.codec, row.shape, row.bytes, row.bits_per_weight)
        alike.setdefault(key, []).append((place, row))
    series = []
    for (parts, role, codec, shape, nbytes, bits), group in alike.items():
        group.sort(key=lambda pair: pair[0].ids)
        first = group[0][0]
        entry = {
            "parts": parts,
            "ids": [[place.ids[i] for place, _ in group] for i in range(len(first.ids))],
            "role": roles[role],
            "codec": codecs[codec],
            "shape": shape,
            "bytes": nbytes,
            "bits": _short(bits),
            "n": len(group),
        }
        if first.layer is not None:
            entry |= {"layer": first.layer, "block": first.block, "projection": first.projection}
        if first.expert is not None:
            entry["expert"] = first.expert
        if any(row.rel_error or row.max_abs_error for _, row in group):
            entry |= {
                "error": [_short(row.rel_error) for _, row in group],
                "largest": [_short(row.max_abs_error) for _, row in group],
            }
        series.append(entry)
    return series


def _short(value: float) -> float | int | None:
    """The number with `DIGITS` significant digits, or None for one that JSON has no word for."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) and short < 1e15 else short
