"""A hub that lists or sends what a stranger has thought of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.hubs import Listing, RemoteFile
from ernie_quant.hubs.hf.read import HuggingFace
from ernie_quant.sources import hub as sources_hub
from helpers.hubs import ADDRESS, NAME


class Lying(HuggingFace):
    """The hub, but for a listing or bytes that a stranger has thought of."""

    def __init__(self, files: dict[str, int] | None = None, spoil: Callable[[str, bytes], bytes] | None = None) -> None:
        super().__init__()
        self.files, self.spoil = files or {}, spoil

    def listing(self, repo: str, revision: str) -> Listing:
        found = super().listing(repo, revision)
        more = {name: RemoteFile(name, nbytes, "00" * 32) for name, nbytes in self.files.items()}
        return replace(found, files={**found.files, **more})

    @contextmanager
    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
        with super().read(listing, name, start, stop) as chunks:
            ranged = stop is not None and name.endswith(".safetensors")
            yield iter([self.spoil(name, b"".join(chunks))]) if self.spoil and ranged else chunks


def open_lying(hub: Lying) -> Checkpoint:
    return sources_hub.open_remote(hub, ADDRESS, NAME, "")
