"""Which tensors stand together in which file of the result, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ernie_quant import writers
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.planning.steps import Shard, Step, stacks_of
from ernie_quant.runtimes import Runtime


def into_files(steps: Sequence[Step], target: Runtime, shard_bytes: int, stem: str) -> tuple[Shard, ...]:
    """Steps in order, by folder, cut into files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    prequantized = any(step.quantized for step in steps)  # a plain result is one folder, as the published ones are
    folders: dict[str, list[Step]] = {}
    for step in steps:
        folders.setdefault(target.folder(step.role) if prequantized else "", []).append(step)
    return tuple(shard for folder, inside in folders.items() for shard in files(folder, inside, target, shard_bytes, stem))


def files(folder: str, steps: Sequence[Step], target: Runtime, shard_bytes: int, stem: str) -> list[Shard]:
    """The files of one folder, whose names begin with `stem`."""
    file_format = writers.find(target.FORMAT)
    groups: list[list[Step]] = [[]]
    size = 0
    for _, members in itertools.groupby(steps, lambda step: step.group or step.name):
        together = list(members)
        nbytes = sum(step.nbytes for step in together)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1] += together
        size += nbytes
    total, prefix = len(groups), f"{folder}/" if folder else ""
    numbers = [f"-{i:05d}-of-{total:05d}" for i in range(1, total + 1)] if total > 1 else [""]
    shards = []
    for number, inside in zip(numbers, groups, strict=True):
        stacks = stacks_of(inside)
        specs = {name: _stored(part.spec, stacks.get(name)) for step in inside for name, part in step.parts.items()}
        name = f"{prefix}{stem}{number}{file_format.EXTENSION}"
        shards.append(Shard(name, tuple(inside), file_format.order(specs)))
    return shards


def _stored(spec: TensorSpec, stacked: int | None) -> TensorSpec:
    """The whole of a stored tensor, of which one weight has `spec`."""
    return spec if stacked is None else TensorSpec((stacked, *spec.shape), spec.dtype)
