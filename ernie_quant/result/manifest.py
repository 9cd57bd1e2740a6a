"""The lists that describe a finished result: the manifest and the hashes. No times: the same run, the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ernie_quant import version
from ernie_quant.errors import OutputError
from ernie_quant.jsonio import read_object
from ernie_quant.paths import MANIFEST, README, STATE
from ernie_quant.planning.command import command_of
from ernie_quant.planning.identity import fingerprint, libraries
from ernie_quant.planning.steps import Plan, Shard
from ernie_quant.planning.summary import bits_per_weight
from ernie_quant.reporting import calibration
from ernie_quant.result import front_matter


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a finished result. Raises OutputError for a folder that has none."""
    if not (out / MANIFEST).is_file():
        begun = (out / STATE).is_dir()
        raise OutputError(
            f"{out}: is not finished; run the same command again"
            if begun
            else f"{out}: has no {MANIFEST}; it was not made by ernie-quant"
        )
    manifest = read_object(out / MANIFEST)
    files, recipe = manifest.get("files"), manifest.get("recipe")
    if not isinstance(files, dict) or not isinstance(recipe, dict) or not isinstance(manifest.get("runtime"), str):
        raise OutputError(f"{out / MANIFEST}: lacks files, recipe or runtime")
    if odd := next((name for name, e in files.items() if not isinstance(e, dict) or not isinstance(e.get("sha256"), str)), None):
        raise OutputError(f"{out / MANIFEST}: says no sha256 of {odd[:200]}")
    return manifest


Entries = Mapping[str, Mapping[str, Any]]


def describe(plan: Plan) -> dict[str, Any]:
    """The manifest of `plan` but for its files: what was made from what, by which versions, with which result."""
    first = plan.quantized_by or plan
    source_card = plan.origin.folder / README
    return {
        **plan.identity,
        "tool": "ernie-quant",
        "version": version.__version__,
        "command": command_of(plan),
        "libraries": libraries(),
        "source_name": plan.origin.title,
        "source_address": plan.origin.address,
        "fingerprint": fingerprint(plan.identity),
        "layout": plan.layout.name,
        "summary": {
            "bytes_in": plan.origin.nbytes,
            "bytes_out": plan.nbytes,
            "bits_per_weight": round(bits_per_weight(plan), 4),
            "tp_sizes": list(plan.tp_sizes),
            "gpus": {memory: asdict(spread) for memory, spread in first.gpus.items()},
            "front_matter": front_matter.of_source(source_card if source_card in plan.origin.extra_files else None),
            "notes": list(plan.notes),
            **({"calibration": calibration.summary(plan.calibrated)} if plan.calibrated else {}),
        },
    }


def manifest(described: Mapping[str, Any], plan: Plan, files: Entries) -> dict[str, Any]:
    """`ernie-quant.json`: what `describe` says, and size, hash and sources of every file."""
    made_from = {shard.filename: {"sources": _sources(plan, shard)} for shard in plan.shards}
    return {**described, "files": {name: {**entry, **made_from.get(name, {})} for name, entry in files.items()}}


def _sources(plan: Plan, shard: Shard) -> list[str]:
    """Files of the source that a file of the result was made from."""
    found = sorted(plan.source.name_of(file) for file in shard.needs)
    if plan.quantized_by is None:
        return found
    return sorted(
        {s for first in plan.quantized_by.shards if first.filename in found for s in _sources(plan.quantized_by, first)}
    )


def sums(files: Entries, manifest_text: bytes) -> str:
    """SHA256SUMS, as `sha256sum -c` reads it: every file but itself."""
    hashes = {name: str(entry["sha256"]) for name, entry in files.items()}
    hashes[MANIFEST] = hashlib.sha256(manifest_text).hexdigest()
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
