"""The YAML at the top of a card, through huggingface_hub's own reader and writer of it: what hubs show, filter and link by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_quant import runtimes

MOST_BYTES, MOST_LETTERS, MOST_VALUES = 1 << 18, 200, 50  # of a stranger's card, of a value, and of a list
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
SPELLINGS = {"licence": "license", "licence_name": "license_name", "licence_link": "license_link"}
SPDX = re.compile(r"[A-Za-z0-9.+-]+")
OURS = ("ernie4.5", "ernie-quant")


def of_source(readme: Path | None) -> dict[str, Any]:
    """Licence, language, task and tags as the source's card states them; nothing for a source without one.

    Text and lists of text are taken over, and nothing else: a card is a stranger's.
    """
    if readme is None or not readme.is_file():
        return {}
    with open(readme, "rb") as file:
        text = file.read(MOST_BYTES).decode("utf-8", "replace")
    found = {}
    for key, value in _read(text).items():
        key = SPELLINGS.get(str(key), str(key))
        if key in KEPT and (known := _plain(value)):
            found[key] = known
    return {key: _licence(value) if key == "license" else value for key, value in sorted(found.items())}


def block(made: Mapping[str, Any], config: Mapping[str, Any], tags: Sequence[str] = ()) -> str:
    """Of a result's card. `made`: its manifest; `config`: its config.json; `tags`: more than they say."""
    from huggingface_hub import ModelCardData

    given, said = made["summary"]["front_matter"], made.get("card", {})
    _, _, repo = made["source_address"].partition("://")
    base = said.get("base_model") or repo
    known = {key: value for key, value in given.items() if key != "tags"}
    theirs = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags", ()))
    known |= {
        "library_name": runtimes.find(made["runtime"]).library(config),
        "tags": list(dict.fromkeys([*theirs, *OURS, *tags])),
    }
    known |= {"base_model": base, "base_model_relation": "quantized"} if base else {}
    known |= {"model_name": said["name"]} if said.get("name") else {}
    return f"---\n{ModelCardData(**known).to_yaml()}\n---"


def _read(text: str) -> dict[str, Any]:
    """What its front matter says; nothing of one that is no YAML."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        card: Any = ModelCard(text.lstrip("\ufeff"), ignore_metadata_errors=True)
        found: dict[str, Any] = card.data.to_dict()
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
    return found


def _plain(value: object) -> str | list[str]:
    """Text, or a list of it, each on one line; empty for all else."""
    if isinstance(value, list):
        return [text for item in value[:MOST_VALUES] if isinstance(item, str) and (text := _line(item))]
    return _line(value) if isinstance(value, str) else ""


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if text.isprintable() and len(text) <= MOST_LETTERS else ""


def _licence(value: str | list[str]) -> str | list[str]:
    """Hubs know licences by lower-case names: `Apache-2.0`, `Apache 2.0` -> `apache-2.0`."""
    if isinstance(value, list):
        return [name for item in value if isinstance(name := _licence(item), str)]
    joined = re.sub(r"\s+", "-", value)
    return joined.lower() if SPDX.fullmatch(joined) else value
