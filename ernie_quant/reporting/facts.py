"""What a page says of a whole result: its sums, and how it was made. Header and manifest may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_quant.errors import line_of
from ernie_quant.reporting.numbers import shown
from ernie_quant.reporting.rows import total
from ernie_quant.reporting.saved import Report

MOST_LETTERS = 8000  # of a command; a piece of it at a time is made to print
PIECE = 400


def facts(report: Report) -> dict[str, Any]:
    """The head of a page."""
    everything, changed = total(report.rows), total([row for row in report.rows if row.changed])
    source = as_object(report.manifest.get("source"))
    files = [as_object(file) for file in as_object(source.get("files")).values()]
    weight_files = [file["bytes"] for file in files if "header" in file and type(file.get("bytes")) is int]
    return {
        "name": line_of(report.name),
        "source": as_text(report.manifest.get("source_name")),
        "revision": as_text(source.get("revision")),
        "version": as_text(report.manifest.get("version")),
        "recipe": as_text(report.header.get("recipe")),
        "runtime": as_text(report.header.get("runtime")),
        "notes": [as_text(note) for note in as_list(report.header.get("notes"))],
        **_made(report.manifest),
        "source_bytes": max(0, sum(weight_files)),
        "bytes": everything.bytes,
        "weights": everything.weights,
        "tensors": everything.tensors,
        "changed": changed.tensors,
        "bits": shown(everything.bits_per_weight),
        "error": shown(changed.rel_error) if changed.tensors else None,
    }


def _made(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The command if the manifest tells it, rules, options and versions: what would make the result again."""
    command, recipe = manifest.get("command"), as_object(manifest.get("recipe"))
    rules = [as_object(rule) for rule in as_list(recipe.get("rules"))]
    words = [[as_text(rule.get("applies_to")), as_text(rule.get("codec"))] for rule in rules]
    return {
        "command": whole(command) if isinstance(command, str) else "",
        "address": as_text(manifest.get("source_address")),
        "rules": words if "rules" in recipe else None,
        "options": _pairs({"keep_unfit": recipe.get("keep_unfit"), **as_object(manifest.get("options"))}),
        "libraries": _pairs(as_object(manifest.get("libraries"))),
    }


def _pairs(values: Mapping[str, Any], before: str = "") -> list[list[str]]:
    """Names and values of what is set; those of an object inside under both names."""
    found = []
    for key, value in sorted(values.items()):
        if isinstance(value, dict) and not before:
            found += _pairs(value, f"{key}.")
        elif value not in (None, False, "", [], {}):
            words = ", ".join(map(str, value)) if isinstance(value, list) else "yes" if value is True else str(value)
            found.append([line_of(before + key), line_of(words)])
    return found


def whole(text: str) -> str:
    """A long text with nothing left out, but what is beyond all commands."""
    pieces = [line_of(text[at : at + PIECE]) for at in range(0, min(len(text), MOST_LETTERS), PIECE)]
    return "".join(pieces) + (" …" if len(text) > MOST_LETTERS else "")


def as_object(value: Any) -> Mapping[str, Any]:
    """The value if it is an object, or an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, or an empty one."""
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """The value if it is text, on one line, or nothing."""
    return line_of(value) if isinstance(value, str) else ""
