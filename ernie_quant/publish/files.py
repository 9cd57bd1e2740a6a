"""The files of a result as they are published: card and page under the repository's name, hashes, what is uploaded already."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ernie_quant import writers
from ernie_quant.disk import write_file
from ernie_quant.errors import ErnieQuantError, OutputError, VerifyError
from ernie_quant.hubs import LocalFile
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.paths import CONFIG, FILE, MANIFEST, README, SUMS, inside
from ernie_quant.publish.places import folder_of, remote_name
from ernie_quant.reporting import evaluation
from ernie_quant.reporting.page import render
from ernie_quant.reporting.rows import FILENAME, PAGE, PLOTS_FOLDER, TensorReport
from ernie_quant.reporting.saved import Report, read
from ernie_quant.result import card
from ernie_quant.result.manifest import read_manifest, sums
from ernie_quant.runtimes import Place

ANYWAY = "--allow-odd-values (in a job allow_odd_values = true) publishes it all the same"
EVALUATION = "eval.json"
NOTHING: Mapping[str, str] = MappingProxyType({})
UPLOADED = ".ernie-quant-published.json"  # what was uploaded and deleted here, for a publish that is interrupted


def entitled(out: Path, place: Place, evaluated: Path | None = None, said: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """The manifest, after card, page and pictures were made under the repository's name and entered in it.

    `evaluated`: the kept result of an evaluation, which becomes a file of the result and a table of the card. `said`: name and
    base_model of the card; what is not given stays as an earlier publish was told.
    """
    manifest = read_manifest(out)
    before = manifest.get("card", {})
    if any(said.values()):
        manifest["card"] = {**before, **{key: value for key, value in said.items() if value}}
    found = _evaluation(out, manifest, evaluated)
    if README not in manifest["files"]:
        return manifest
    config = config_of(out, manifest)
    rows: list[TensorReport] = []
    made: dict[str, bytes] = {} if found is None else {EVALUATION: dumps(found).encode()}
    if FILENAME in manifest["files"]:
        report = replace(read(out), name=place.local)
        rows = list(report.rows)
        made[PAGE] = render(report)
        made |= {f"{PLOTS_FOLDER}/{name}": data for name, data in _pictures(report).items()}
    pictures = [name for name in made if name.startswith(PLOTS_FOLDER)]
    made[README] = card.readme(manifest, config, rows, place, pictures, found).encode()
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in made.items()}
    if manifest.get("card", {}) != before or any(manifest["files"].get(name) != entry for name, entry in entries.items()):
        for name, data in made.items():
            (out / name).parent.mkdir(exist_ok=True)
            write_file(out / name, data)
        manifest["files"] |= entries
        text = dumps(manifest).encode()
        write_file(out / SUMS, sums(manifest["files"], text).encode())
        write_file(out / MANIFEST, text)
    return manifest


def config_of(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a result, or what its weight files say in its place. Raises CheckpointError or ConfigError."""
    if CONFIG in manifest["files"]:
        return read_object(inside(out, CONFIG, MANIFEST))
    first = next((name for name in sorted(manifest["files"]) if Path(name).suffix in writers.extensions()), "")
    return {FILE: first}


def refuse_odd(repo: str, rows: Iterable[TensorReport]) -> None:
    """A model with NaN or infinity is none, whoever made it. Raises VerifyError with the names."""
    if infinite := [row.name for row in rows if row.not_finite]:
        raise VerifyError(f"{repo}: is not published, its weights hold NaN or infinity; {ANYWAY}", infinite)


def reported(out: Path) -> Sequence[TensorReport]:
    """The rows of report.json; none of a result whose errors nobody measured. Raises CheckpointError or OutputError."""
    return read(out).rows if FILENAME in read_manifest(out)["files"] else ()


def _evaluation(out: Path, manifest: Mapping[str, Any], evaluated: Path | None) -> dict[str, Any] | None:
    """The one that is given, or that an earlier publish was given. Raises OutputError for that of another result."""
    if evaluated is None and EVALUATION not in manifest["files"]:
        return None
    file = evaluated or inside(out, EVALUATION, MANIFEST)
    found = evaluation.read(file)
    if (one := found["result"]["fingerprint"]) != (two := manifest["fingerprint"]):
        raise OutputError(f"{file}: is of another result (fingerprint {one[:12] or 'unknown'}, {out} has {two[:12]})")
    return found


def repair(out: Path, place: Place) -> None:
    """Finish what a publish to `place` was killed in: card, page, hashes and manifest follow from the other files."""
    if (out / MANIFEST).is_file():
        with suppress(ErnieQuantError, KeyError, TypeError):  # what else is wrong is found by whoever reads it next
            entitled(out, place)


def _pictures(report: Report) -> dict[str, bytes]:
    """The plots of the card, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from ernie_quant.reporting.plots import draw

    return draw(report)


def local_files(out: Path, manifest: Mapping[str, Any], repo: str) -> list[LocalFile]:
    """Every file of the result under its name in the repository, the manifest last.

    Raises OutputError for one that is neither here nor uploaded.
    """
    uploaded, folder = _uploaded(out, repo), folder_of(manifest)
    files = []
    for name, entry in manifest["files"].items():
        if (out / name).exists() or name not in uploaded or uploaded[name] != entry["sha256"]:
            path = inside(out, name, MANIFEST)
            if (nbytes := path.stat().st_size) != entry["bytes"]:
                raise OutputError(f"{path}: has {nbytes} bytes, the manifest says {entry['bytes']}; `verify` tells more")
            files.append(LocalFile(remote_name(name, folder), entry["bytes"], entry["sha256"], path))
        else:
            files.append(LocalFile(remote_name(name, folder), entry["bytes"], entry["sha256"], None))
    for name in (SUMS, MANIFEST):
        data = inside(out, name, "the result").read_bytes()
        files.append(LocalFile(remote_name(name, folder), len(data), hashlib.sha256(data).hexdigest(), out / name))
    return files


def _uploaded(out: Path, repo: str) -> dict[str, str]:
    """File -> sha256 of what was uploaded to this repository and deleted."""
    if not (out / UPLOADED).is_file():
        return {}
    table = read_object(out / UPLOADED)
    return {str(k): str(v) for k, v in table.get("files", {}).items()} if table.get("repo") == repo else {}


def delete(out: Path, repo: str, file: LocalFile) -> None:
    """Delete a weight file that is uploaded; first remember that it is. Other files stay."""
    if file.path is None or file.path.suffix not in writers.extensions():
        return
    table = {"repo": repo, "files": _uploaded(out, repo) | {file.name: file.sha256}}
    write_file(out / UPLOADED, dumps(table).encode())
    file.path.unlink()
