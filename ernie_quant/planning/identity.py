"""What the bytes of a result depend on, as data: the same identity, the same files.

It stands in the manifest of a result, and in the private state of one that was begun; what differs can be named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from ernie_quant import codecs, runtimes, writers
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs import Codec
from ernie_quant.jsonio import dumps
from ernie_quant.planning import recipe
from ernie_quant.planning.recipe import Recipe
from ernie_quant.views.build import refs
from ernie_quant.views.kinds import View

LIBRARIES = ("numba", "numpy", "torch")  # what computes the bytes
SHOWN = 4  # changes that an error names

Identity = Mapping[str, Any]


def identity(source: Checkpoint, runtime: str, rules: Recipe, options: Mapping[str, object]) -> Identity:
    """Source, recipe, options, and versions of what makes the bytes: codecs, runtime and file format.

    Not that of the program: another release that writes the same bytes makes no result old.
    """
    target = runtimes.find(runtime)
    plain = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in options.items()}
    return {
        "codecs": _versions(rule.codec for rule in rules.rules),
        "runtime": runtime,
        "versions": {"runtime": target.VERSION, "format": writers.find(target.FORMAT).VERSION},
        "recipe": recipe.as_dict(rules),
        "options": plain,
        "source": _of_source(source),
    }


def _versions(used: Iterable[Codec]) -> dict[str, int]:
    return {codecs.name_of(codec): codec.version for codec in used}


def _of_source(source: Checkpoint) -> dict[str, Any]:
    """Sizes and headers of the weight files, the config, and the revision where it is known; not what is carried along."""
    files: dict[str, Any] = {}
    for rank in source.ranks:
        headers = {file: hashlib.sha256() for file in rank.files}
        for ref in sorted(rank.refs.values(), key=lambda r: r.name):
            extents = [(e.start, e.nbytes, e.stored, e.latin1) for e in ref.extents]
            line = (ref.name, ref.spec.dtype, ref.spec.shape, extents, ref.fortran)
            headers[ref.file].update(repr(line).encode())
        for file, digest in headers.items():
            files[source.name_of(file)] = {"bytes": rank.files[file].nbytes, "header": digest.hexdigest()}
    config = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode()).hexdigest()
    return {"revision": source.revision, "config": config, "files": files}


def of_statistics(statistics: Mapping[str, Mapping[str, View]]) -> str:
    """A hash that changes with what statistics are given for which weights, and with the files they lie in."""
    digest = hashlib.sha256()
    for name, values in sorted(statistics.items()):
        for key, view in sorted(values.items()):
            stamps = [(ref.name, ref.file.name, ref.file.stat().st_size, ref.file.stat().st_mtime_ns) for ref in refs(view)]
            digest.update(repr((name, key, view.shape, view.dtype, stamps)).encode())
    return digest.hexdigest()


def fingerprint(what: Identity) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(dumps(what).encode()).hexdigest()


def libraries() -> dict[str, str]:
    """Versions of the packages whose arithmetic the bytes come from."""
    return {name: metadata.version(name) for name in LIBRARIES}


def changes(before: Any, now: Any) -> list[str]:
    """What differs, a line each: `recipe rules 1 codec: is int8, was int4`; at most a few, and how many more."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    lines = []
    for path in dict.fromkeys([*new, *old]):
        if path not in old:
            lines.append(f"{path}: is {_short(new[path])}, was not there")
        elif path not in new:
            lines.append(f"{path}: was {_short(old[path])}, is not there")
        elif old[path] != new[path]:
            lines.append(f"{path}: is {_short(new[path])}, was {_short(old[path])}")
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path} {key}".strip())
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value, 1):
            yield from _leaves(inner, f"{path} {number}")
    else:
        yield path, value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text[:80] or "unknown"  # a hash says enough with its beginning
