"""What was published, and what was sent for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ernie_quant.hubs import publisher
from ernie_quant.publish import Destination, Published, publish
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import writes

REPO = "me/tiny-wint4"


def publish_to(out: Path, repo: str = REPO, **options: Any) -> Published:
    return publish(out, publisher("hf"), Destination(repo, **options))


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def on_hub(hub: LoopbackHub, repo: str = REPO, revision: str = "main") -> dict[str, str]:
    files = hub.repo(repo).files(revision)
    return {name: file.sha256 for name, file in files.items() if name != ".gitattributes"}


def weights(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def commits(hub: LoopbackHub) -> list[str]:
    return [r.path for r in writes(hub) if "/commit/" in r.path]


def objects_sent(hub: LoopbackHub) -> list[str]:
    """sha256, and number of the part, of every LFS object or part of one that was uploaded."""
    return [r.path.removeprefix(f"/upload/{REPO}/") for r in hub.requests if r.method == "PUT" and r.status == 200]


def objects(sent: list[str]) -> set[str]:
    return {path.partition("/")[0] for path in sent}
