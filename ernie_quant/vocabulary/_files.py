"""The files beside the weights that say what the tokens are: they come from strangers, and some may be missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.jsonio import read_object
from ernie_quant.paths import inside

PIECES, BACKEND = "tokenizer.model", "tokenizer.json"
SETTINGS, ADDED, SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
FILES = (PIECES, BACKEND, SETTINGS, ADDED, SPECIAL, GENERATION, TEMPLATE, TEMPLATE_JSON)


@dataclass(frozen=True)
class Files:
    """Those of `FILES` that lie in a folder. `links` that lead out of it are followed only if told so."""

    folder: Path
    links: bool = False
    _tables: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def has(self, name: str) -> bool:
        """Is it there, or a link that should lead to it?"""
        path = self.folder / name
        return path.exists() or path.is_symlink()

    def raw(self, name: str, most: int) -> bytes:
        """Its bytes. Raises CheckpointError, also if there are more than `most`."""
        path = self._found(name)
        try:
            with open(path, "rb") as file:
                data = file.read(most + 1)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from error
        if len(data) > most:
            raise CheckpointError(f"{name}: is too large: more than {most} bytes")
        return data

    def table(self, name: str) -> dict[str, Any]:
        """Its JSON object, read once; empty where there is no such file. Raises CheckpointError."""
        if name not in self._tables:
            # NaN and infinities pass: model_max_length may be one
            self._tables[name] = read_object(self._found(name), finite=False) if self.has(name) else {}
        return self._tables[name]

    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self.table(SETTINGS)

    def _found(self, name: str) -> Path:
        return inside(self.folder, name, "the tokenizer", links=self.links)


def content(value: Any) -> str | None:
    """Text of a token as these files write one: `"</s>"` or `{"content": "</s>", ...}`."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) and found else None


def special_names(files: Files) -> Iterator[str]:
    """Texts of the tokens that tokenizer_config.json and special_tokens_map.json call special, in their order."""
    for name in (SETTINGS, SPECIAL):
        for key, value in files.table(name).items():
            if key in ("additional_special_tokens", "extra_special_tokens"):
                values = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
                yield from filter(None, map(content, values))
            elif key.endswith("_token") and (text := content(value)):
                yield text
