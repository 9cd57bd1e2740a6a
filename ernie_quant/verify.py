"""Read a result back from disk and check everything that can be known about it.

Nothing is taken from the run: names and shapes follow from the architecture's table, the form of every tensor from
config.json, the values from the files. The report and the manifest are what is checked, not what is believed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ernie_quant import names, runtimes, views
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import Keep
from ernie_quant.errors import CheckpointError, ErnieQuantError, OutputError, VerifyError
from ernie_quant.jsonio import read_object
from ernie_quant.lazy import Same
from ernie_quant.measure import Difference, compare
from ernie_quant.names import Weight
from ernie_quant.output import MANIFEST, STATE, weight_folders
from ernie_quant.plan import oriented
from ernie_quant.readers import by_suffix
from ernie_quant.report import FILENAME, TensorReport
from ernie_quant.resolve import resolve, resolve_quantized
from ernie_quant.run import one_torch_thread
from ernie_quant.sources.folder import inside
from ernie_quant.stored import Stored, open_stored
from ernie_quant.views import Files, read

if TYPE_CHECKING:
    pass

Progress = Callable[[int], None]
CHUNK = 8 << 20
RESHARD = "reshard"  # how the name of such a recipe begins
TOLERANCE = 1e-9  # of a relative error, which is computed by the same sums again


@dataclass(frozen=True)
class Verified:
    """What was checked."""

    files: int
    tensors: int
    quantized: int
    against: bool


def verify(out: Path, against: Path | None = None, progress: Progress = lambda _: None) -> Verified:
    """Check the result in `out`, and with `against` every tensor of it against the source. Raises VerifyError."""
    manifest = _manifest(out)
    problems = list(_file_problems(out, manifest, progress))
    if problems:  # nothing in a file that changed is worth a closer look
        raise VerifyError(f"{out}: {len(problems)} file(s) are not as they were written", problems)
    checkpoint = Checkpoint.open(out)
    target = runtimes.find(manifest["runtime"])
    stored, problems = open_stored(checkpoint, target)
    rows, more = _reports(out, stored) if _has_report(manifest) else ({}, [])
    problems += [*checkpoint.anomalies, *more]
    if problems:
        raise VerifyError(f"{out}: {len(problems)} disagreement(s)", problems)
    with one_torch_thread(), Files() as files:
        problems = list(_value_problems(stored, files))
        if against is not None:
            problems += _against(stored, rows, target, files, Checkpoint.open(against))
    if problems:
        raise VerifyError(f"{out}: {len(problems)} tensor(s) are not as reported", problems)
    quantized = sum(not isinstance(s.codec, Keep) for s in stored)
    return Verified(len(manifest["files"]), len(stored), quantized, against is not None)


def _manifest(out: Path) -> dict[str, Any]:
    if not (out / MANIFEST).is_file():
        begun = (out / STATE).is_dir()
        raise OutputError(
            f"{out}: is not finished; run the same command again"
            if begun
            else f"{out}: has no {MANIFEST}; it was not made by ernie-quant"
        )
    manifest = read_object(out / MANIFEST)
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("runtime"), str):
        raise OutputError(f"{out / MANIFEST}: lacks files or runtime")
    return manifest


def _has_report(manifest: dict[str, Any]) -> bool:
    """All have one but the resharded files of others, whose errors nobody measured."""
    recipe = manifest.get("recipe")
    resharded = isinstance(recipe, dict) and str(recipe.get("name")).startswith(RESHARD)
    return FILENAME in manifest["files"] or not resharded


def _file_problems(out: Path, manifest: dict[str, Any], progress: Progress) -> Iterator[str]:
    for name, entry in manifest["files"].items():
        try:
            path = inside(out, name, MANIFEST)
        except CheckpointError as error:
            yield str(error)
            continue
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            yield f"{name}: has {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}"
        elif (digest := _sha256(path, progress)) != entry.get("sha256"):
            yield f"{name}: its sha256 is {digest[:16]}…, the manifest says {str(entry.get('sha256'))[:16]}…"
    for path in sorted(p for folder in weight_folders(out) for p in folder.iterdir()):
        name = path.relative_to(out).as_posix()
        if path.suffix in by_suffix() and name not in manifest["files"]:
            yield f"{name}: is not in the manifest"


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            progress(len(data))
    return digest.hexdigest()


def _reports(out: Path, stored: list[Stored]) -> tuple[dict[str, TensorReport], list[str]]:
    try:
        rows = {r["name"]: TensorReport.from_json(r) for r in read_object(out / FILENAME)["tensors"]}
    except (KeyError, TypeError):
        raise VerifyError(f"{out / FILENAME}: lacks the rows of its tensors", []) from None
    problems = [f"{n}: is in the report, not in the files" for n in rows.keys() - {s.name for s in stored}]
    for entry in stored:
        row = rows.get(entry.name)
        nbytes = sum(views.spec_of(part).nbytes for part in entry.parts.values())
        if row is None:
            problems.append(f"{entry.name}: is in the files, not in the report")
            continue
        said = (row.role, row.codec == "kept", row.shape, row.bytes, row.bits_per_weight)
        bits = entry.codec.bits_per_weight(entry.spec)
        if said != (entry.rule.role, isinstance(entry.codec, Keep), entry.shape, nbytes, bits):
            problems.append(
                f"{entry.name}: the report says {row.role}, {row.codec} {row.shape} in {row.bytes} bytes, {row.bits_per_weight:g}"
                f" bits per weight; the files hold {entry.rule.role}, {entry.codec.describe()} {entry.shape} in {nbytes} bytes,"
                f" {bits:g} bits per weight"
            )
    return rows, problems


def _value_problems(stored: list[Stored], files: Files) -> Iterator[str]:
    """Quantized weights must decode to finite numbers; what every rank has must be the same in all."""
    for entry in stored:
        if not isinstance(entry.codec, Keep):
            for rows in entry.slabs():
                if not bool(entry.read(files, rows).isfinite().all()):
                    yield f"{entry.name}: rows {rows[0]} to {rows[1]} decode to NaN or infinity"
                    break
        elif any(isinstance(part, Same) for part in entry.parts.values()):
            try:
                for rows in entry.slabs():
                    entry.read(files, rows)
            except CheckpointError as error:
                yield str(error)


def _against(
    stored: list[Stored], rows: Mapping[str, TensorReport], target: ModuleType, files: Files, source: Checkpoint
) -> list[str]:
    """Kept tensors have the source's bytes; decoded ones have the error that was reported; none is missing."""
    quantized = bool(source.config.get("quantization_config"))  # the result was dequantized from it
    table = resolve_quantized(source) if quantized else resolve(source, frozenset(names.FIXES))
    if table.problems:
        raise VerifyError(f"{source.folder}: the source itself has {len(table.problems)} problem(s)", table.problems)
    weights = {w.name: w for w in table.map.write(table.weights, target.LAYOUT)}
    found = {s.name: s for s in stored}
    problems = [f"{name}: is in the source, not in the result" for name in weights.keys() - found.keys()]
    problems += [f"{name}: is in the result, not in the source" for name in found.keys() - weights.keys()]
    for name in sorted(weights.keys() & found.keys(), key=names.natural):
        try:
            problem = _difference(found[name], weights[name], rows.get(name), files)
        except ErnieQuantError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
    return problems


def _difference(entry: Stored, weight: Weight, row: TensorReport | None, files: Files) -> str | None:
    import torch

    view = oriented(weight, entry.codec, entry.target.LAYOUT)
    if view.shape != entry.shape:
        return f"{entry.name}: is {entry.shape}, in the source {view.shape}"
    if row is not None and set(row.sources) != set(weight.sources):
        return f"{entry.name}: the report says it comes from {', '.join(row.sources)}, it comes from {', '.join(weight.sources)}"
    total = Difference()
    for span in entry.slabs():
        original = read(view, files, span)
        result = entry.read(files, span)
        if isinstance(entry.codec, Keep):
            if original.dtype != result.dtype or not torch.equal(original.view(torch.uint8), result.view(torch.uint8)):
                return f"{entry.name}: should be the source's bytes, and is not"
        else:
            total += compare(entry.name, original, result)
    for what, is_, said in (
        ()
        if row is None
        else (
            ("relative error", total.rel_error, row.rel_error),
            ("largest error", total.largest, row.max_abs_error),
            ("squared error", total.error, row.squared_error),
            ("squared norm", total.total, row.squared_norm),
            ("SQNR in dB", total.sqnr_db or 0.0, row.sqnr_db or 0.0),
        )
    ):
        if abs(is_ - said) > TOLERANCE * max(1.0, abs(said)) or not math.isfinite(is_):
            return f"{entry.name}: its {what} is {is_:.6g}, the report says {said:.6g}"
    return None


def as_json(result: Verified) -> dict[str, Any]:
    """For --json."""
    return json.loads(json.dumps({"status": "verified", **result.__dict__}))  # type: ignore[no-any-return]
