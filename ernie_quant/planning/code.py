"""Names of Python code in config files: those that point to files which are not carried along are dropped."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.paths import CONFIG

AUTO_MAP, PIPELINES = "auto_map", "custom_pipelines"
VOCABULARIES = ("tokenizer.json", "*vocab*.json", "added_tokens*.json", "special_tokens_map*.json")  # any word is a key there
MOST = 4 << 20  # bytes of a config file


def modules_of(copies: Iterable[Path]) -> set[str]:
    """The modules that are carried along."""
    return {path.stem for path in copies if path.suffix == ".py"}


def without_missing(value: Any, modules: Collection[str]) -> Any:
    """A config without the references, at any depth, to code that is in none of `modules`; the same value if there are none."""
    if isinstance(value, list):
        return [without_missing(item, modules) for item in value]
    if not isinstance(value, dict):
        return value
    table = {}
    for key, item in value.items():
        if key == AUTO_MAP:
            item = _references(item, modules)
        elif key == PIPELINES and isinstance(item, dict):
            item = {k: v for k, v in item.items() if isinstance(v, dict) and _is_there(v.get("impl"), modules)} or None
        else:
            item = without_missing(item, modules)
        if item is not None or value[key] is None:
            table[key] = item
    return table


def _references(value: Any, modules: Collection[str]) -> Any:
    """What is left of an auto_map; None for nothing."""
    if isinstance(value, str):
        return value if _is_there(value, modules) else None
    if isinstance(value, list):  # slow and fast tokenizer
        kept = [_references(item, modules) for item in value]
        return kept if any(item is not None for item in kept) else None
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := _references(item, modules)) is not None} or None
    return value


def _is_there(reference: Any, modules: Collection[str]) -> bool:
    """`module.Class`; `org/name--module.Class` is on a hub, and not carried along."""
    return isinstance(reference, str) and "--" not in reference and reference.rpartition(".")[0] in modules


def may_name_code(name: str) -> bool:
    """A config file, not a vocabulary."""
    last = PurePosixPath(name).name
    return last.endswith(".json") and not any(fnmatchcase(last, kind) for kind in VOCABULARIES)


def mended(data: bytes, modules: Collection[str]) -> bytes:
    """The bytes of a config file without such references; as they are if there are none, or if it is not JSON."""
    try:
        table = json.loads(data) if len(data) <= MOST else None
        kept = without_missing(table, modules)
    except (ValueError, RecursionError):
        return data
    return data if kept == table else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def notes(source: Checkpoint, copies: Collection[Path]) -> list[str]:
    """Which files lose references, by what they are now."""
    modules = modules_of(copies)
    losers = [CONFIG] if without_missing(source.config, modules) != source.config else []
    for path in copies:
        name = source.name_of(path)
        with suppress(FileNotFoundError):  # gone since it was listed, or on a hub still
            if may_name_code(name) and path.stat().st_size <= MOST:
                data = path.read_bytes()
                losers += [name] if mended(data, modules) is not data else []
    what = "names of code that is not carried along are dropped from"
    return [f"{what} {', '.join(losers)} (auto_map, custom_pipelines)"] if losers else []
