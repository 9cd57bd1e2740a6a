"""The lists that describe a finished result: the manifest, the hashes, the index. No times: the same run, the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ernie_quant import capacity, card
from ernie_quant.errors import ErnieQuantError
from ernie_quant.identity import fingerprint, libraries
from ernie_quant.plan import Plan, Shard, bits_per_weight

MANIFEST, SUMS = "ernie-quant.json", "SHA256SUMS"

Entries = Mapping[str, Mapping[str, Any]]


def index(shards: Sequence[Shard]) -> dict[str, Any]:
    """model.safetensors.index.json of the files of one folder."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
    weight_map = {name: shard.filename.rpartition("/")[2] for shard in shards for name in shard.specs}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def describe(plan: Plan) -> dict[str, Any]:
    """The manifest of `plan` but for its files: what was made from what, by which versions, with which result."""
    first = plan.quantized_by or plan
    cards = [path for path in plan.origin.extra_files if path.name == "README.md"]
    return {
        **plan.identity,
        "tool": "ernie-quant",
        "libraries": libraries(),
        "source_name": plan.origin.title,
        "source_address": plan.origin.address,
        "fingerprint": fingerprint(plan.identity),
        "layout": plan.layout,
        "summary": {
            "bytes_in": plan.origin.nbytes,
            "bytes_out": plan.nbytes,
            "bits_per_weight": round(bits_per_weight(plan), 4),
            "tp_sizes": list(plan.tp_sizes),
            "gpus": _gpus(first),
            "front_matter": card.front_matter(cards[0] if cards else None),
            "notes": list(plan.notes),
        },
    }


def _gpus(plan: Plan) -> dict[str, int]:
    """How many GPUs of which memory take the result; nothing where headers do not tell (a source that is quantized)."""
    found: dict[str, int] = {}
    with suppress(ErnieQuantError):
        for memory, gib in card.GPUS:
            row = capacity.estimate(plan.origin, capacity.Rule(gpu_memory=gib * capacity.GIB), recipe=plan.recipe)[-1]
            found |= {memory: row.gpus} if row.gpus else {}
    return found


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
