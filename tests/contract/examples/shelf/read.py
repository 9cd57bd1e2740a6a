"""A hub that is a folder: HUB/ORG/NAME/COMMIT/files; the branch is the file HUB/ORG/NAME/main."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from ernie_quant.hubs import Listing, RemoteFile


def root():
    return Path(os.environ["SHELF"])


def files_of(repo, commit):
    folder = root() / repo / commit
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): RemoteFile(
            p.relative_to(folder).as_posix(), p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()
        )
        for p in paths
    }


class Shelf:
    def listing(self, repo, revision):
        commit = (root() / repo / (revision or "main")).read_text()
        return Listing(f"shelf://{repo}", repo, commit, files_of(repo, commit))

    @contextmanager
    def read(self, listing, name, start, stop):
        yield iter([(root() / listing.repo / listing.commit / name).read_bytes()[start:stop]])


connect = Shelf
