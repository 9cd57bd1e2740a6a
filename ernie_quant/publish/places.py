"""Where the files of a result lie in a repository.

A result in files that say everything themselves (GGUF) shares its repository with other types of the model: its weights and
the source's documents lie at the top, where Ollama and LM Studio look for them, all else in a folder by the name of the type.
README.md at the top then lists the types.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from ernie_quant import runtimes, writers
from ernie_quant.hubs import RemoteFile
from ernie_quant.paths import MANIFEST, README, SOURCE_README
from ernie_quant.result import front_matter
from ernie_quant.runtimes import Place

DOCUMENTS = re.compile(r"(?i)licen[cs]e.*|notice.*|copying.*")


def folder_of(manifest: Mapping[str, Any]) -> str:
    """The folder for what is not shared; empty for a result that has its repository to itself."""
    name = str(manifest["recipe"].get("name", ""))
    shares = writers.find(runtimes.find(manifest["runtime"]).FORMAT).SELF_CONTAINED
    return re.sub(r"[^\w.-]+", "-", name) if shares else ""


def remote_name(name: str, folder: str) -> str:
    """Of a file of the result."""
    top = PurePosixPath(name)
    if not folder or top.suffix in writers.extensions() or name == SOURCE_README or DOCUMENTS.fullmatch(top.parts[0]):
        return name
    return f"{folder}/{name}"


def manifests(names: Collection[str]) -> dict[str, str]:
    """Folder ("" for the top) -> the manifest of the result that lies there."""
    found = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == MANIFEST and "/" not in folder:
            found[folder] = name
    return found


def front_page(manifest: Mapping[str, Any], files: Mapping[str, RemoteFile], place: Place) -> bytes:
    """README.md of a repository of several types: which there are, by the files that are there."""
    rows = []
    for folder in sorted(f for f in manifests(files) if f):
        mine = sorted(name for name in files if re.search(rf"-{re.escape(folder)}(-\d{{5}}-of-\d{{5}})?\.gguf$", name))
        size = sum(files[name].nbytes for name in mine) / 1e9
        shown = f"`{mine[0]}`" + (f" and {len(mine) - 1} more" if len(mine) > 1 else "") if mine else ""
        rows.append(f"| [{folder}]({folder}/{README}) | {size:.2f} | {shown} |")
    table = "\n".join(["| type | GB | file |", "|---|---|---|", *rows])
    title = manifest.get("card", {}).get("name") or place.local
    use = f"    ollama run hf.co/{place.name}:TYPE\n    llama-server -hf {place.name}:TYPE --jinja"
    if place.hub != "hf":
        use = "    llama-server -m FILE --jinja"
    return (
        f"{front_matter.block(manifest, {}, ('gguf',))}\n\n# {title}\n\n{manifest['source_name']} for llama.cpp and what is built"
        f" on it, by ernie-quant. What each type lost, and what it was made from, is behind its name.\n\n{table}\n\n{use}\n"
    ).encode()
