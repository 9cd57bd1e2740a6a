"""Where bytes come from, one file each: a folder, and hubs by the scheme of their address (`hf://org/name@revision`).

The file of a hub is named after its scheme and has `open_source(address, repo, revision) -> Checkpoint`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ernie_quant import plugins
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import CheckpointError


def is_address(source: str | Path) -> bool:
    """Is it on a hub?"""
    return isinstance(source, str) and "://" in source


def open_source(source: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint. Raises CheckpointError, ConfigError or RetryError."""
    if not is_address(source):
        from ernie_quant.sources import folder

        return folder.open_folder(Path(source))
    scheme, repo, revision = _parts(str(source))
    found: Checkpoint = plugins.load(sys.modules[__name__], scheme).open_source(f"{scheme}://{repo}", repo, revision)
    return found


def check_address(address: str) -> None:
    """Could it be on a hub that we know? Raises CheckpointError; nobody is asked."""
    _parts(address)


def _parts(address: str) -> tuple[str, str, str]:
    """Scheme, `org/name`, revision. Raises CheckpointError."""
    from ernie_quant.sources._remote import parse

    scheme, repo, revision = parse(address)
    hubs = [name for name in plugins.names(sys.modules[__name__]) if name != "folder"]
    if scheme not in hubs:
        raise CheckpointError(f"{address}: there is no {scheme}://; there is {', '.join(f'{hub}://' for hub in hubs)}")
    return scheme, repo, revision
