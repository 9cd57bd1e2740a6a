"""Where bytes come from: a folder, a GGUF file, or a hub by the scheme of its address (`hf://org/name@revision`)."""

from __future__ import annotations

from pathlib import Path

from ernie_quant import hubs
from ernie_quant.checkpoint import Checkpoint


def is_address(source: str | Path) -> bool:
    """Is it on a hub?"""
    return isinstance(source, str) and "://" in source


def open_source(source: str | Path, *, links: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint, without its data; `links` that lead out of a folder are followed if asked for.

    Raises CheckpointError, ConfigError, HubError or RetryError.
    """
    if not is_address(source):
        from ernie_quant.sources.folder import open_file, open_folder

        path = Path(source)
        return (open_file if path.suffix == ".gguf" and not path.is_dir() else open_folder)(path, links=links)
    from ernie_quant.sources.hub import open_remote

    scheme, repo, revision = hubs.parse(str(source))
    return open_remote(hubs.reader(scheme), f"{scheme}://{repo}", repo, revision)
