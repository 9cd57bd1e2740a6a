"""Folders and files as arguments, and what a shell offers for them when TAB is pressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

ParamType = click.ParamType[Any]


class Source(ParamType):
    """A folder, or an address on a hub: `hf://org/name@revision`."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """An address stays text."""
        return value if isinstance(value, Path) or "://" in value else Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Folders, and where .gguf files lie, files too; nothing for an address."""
        if "://" in incomplete:
            return []
        return [CompletionItem(incomplete, type="file" if _files(incomplete, ".gguf") else "dir")]


class Folder(click.Path):
    """A folder that is read or made; the command itself says what is wrong with it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Folders only."""
        return [CompletionItem(incomplete, type="dir")]


class Toml(Folder):
    """A recipe or a job."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The .toml files that begin so; folders where a shell finds none of them."""
        return [*super().shell_complete(ctx, param, incomplete), *map(CompletionItem, _files(incomplete, ".toml"))]


def _files(incomplete: str, ending: str) -> list[str]:
    """Files whose name begins with the last part of `incomplete`, as they would be typed; none where nobody may look."""
    folder, slash, beginning = incomplete.rpartition("/")
    try:
        found = sorted(p.name for p in Path(folder + slash or ".").expanduser().iterdir() if p.name.endswith(ending))
    except (OSError, RuntimeError):  # the second: no home
        return []
    return [folder + slash + name for name in found if name.startswith(beginning)]


FOLDER, FILE, TOML = Folder(), click.Path(path_type=Path), Toml()
