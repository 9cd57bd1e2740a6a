"""The chat template: how a conversation is written for the model."""

from __future__ import annotations

from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary._files import SETTINGS, TEMPLATE, TEMPLATE_JSON, Files, content

MAX_BYTES = 1 << 20
DEFAULT = "default"


def chat_template(files: Files) -> tuple[str, list[str]]:
    """Of tokenizer_config.json, chat_template.jinja or chat_template.json, and notes; empty if there is none.

    Raises CheckpointError.
    """
    notes: list[str] = []
    found = {}
    for name in (SETTINGS, TEMPLATE, TEMPLATE_JSON):
        if text := _of(files, name, notes):
            if "\0" in text or len(text) > MAX_BYTES:
                what = "holds a zero byte" if "\0" in text else "is too large"
                raise CheckpointError(f"{name}: the chat template {what}")
            found[name] = text
    if not found:
        return "", notes
    first = next(iter(found))
    notes += [f"{name}: another chat template than in {first}; left out" for name in found if found[name] != found[first]]
    return found[first], notes


def _of(files: Files, name: str, notes: list[str]) -> str | None:
    if name != TEMPLATE:
        return _named(files.table(name).get("chat_template"), name, notes)
    if not files.has(name):
        return None
    try:
        return files.raw(name, MAX_BYTES).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{name}: is not UTF-8") from None


def _named(value: Any, name: str, notes: list[str]) -> str | None:
    """A text, or a list of `{"name": ..., "template": ...}`."""
    if value is None or isinstance(value, str):
        return value
    entries = value if isinstance(value, list) else [None]
    table = {}
    for entry in entries:
        key, text = (content(entry.get("name")), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if key is None or not isinstance(text, str):
            raise CheckpointError(f"{name}: chat_template is neither a text nor a list of named ones")
        table[key] = text
    if others := [key for key in table if key != DEFAULT]:
        notes.append(f"{name}: the chat templates {', '.join(others):.200} are left out")
    return table.get(DEFAULT)
