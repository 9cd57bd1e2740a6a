"""Read a result back from disk and check everything that can be known about it.

Nothing is taken from the run: names and shapes follow from the architecture's table, the form of every tensor from
config.json, the values from the files. The report and the manifest are what is checked, not what is believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_quant import runtimes
from ernie_quant.check.integrity import Progress, damaged_files, damaged_weights
from ernie_quant.checkpoint import Checkpoint, Stamp
from ernie_quant.codecs.keep import Keep
from ernie_quant.errors import CheckpointError, ErnieQuantError, VerifyError
from ernie_quant.jsonio import read_object
from ernie_quant.measure import Difference, compare
from ernie_quant.names import Weight
from ernie_quant.paths import weight_folders
from ernie_quant.plan.choose import oriented
from ernie_quant.report.rows import FILENAME, TensorReport
from ernie_quant.result.manifest import read_manifest
from ernie_quant.runtimes import Runtime
from ernie_quant.sources import open_source
from ernie_quant.threads import one_torch_thread
from ernie_quant.views import build, kinds
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Replicated
from ernie_quant.views.read import read
from ernie_quant.weights import plain
from ernie_quant.weights.claims import evidence
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.plain import resolve
from ernie_quant.weights.stored import Stored, open_stored, resolve_quantized

TOLERANCE = 1e-9  # of a relative error, which is computed by the same sums again


@dataclass(frozen=True)
class Verified:
    """What was checked: all files by hash, all tensors by name and shape, the values of `sampled` ones."""

    files: int
    tensors: int
    quantized: int
    sampled: int
    against: bool


def verify(
    out: Path, against: Path | str | None = None, progress: Progress = lambda _: None, sample: int | None = None, *,
    links: bool = False,
) -> Verified:  # fmt: skip
    """Check the result in `out`, and with `against` its tensors against the source. Raises VerifyError.

    Values are checked of `sample` tensors (None: of all): quantized ones must decode to finite numbers whose codes are
    the same again, and against the source, whose `links` are followed if asked for, the error that was reported.
    """
    manifest = read_manifest(out)
    # before the first hash: what is hashed is still what is there at the end
    stamps = {path: Stamp.of(path) for folder in weight_folders(out) for path in folder.iterdir() if path.is_file()}
    if damaged := damaged_files(out, manifest, progress):
        problems = [*damaged.values(), *_by_name(out, manifest, damaged)]
        raise VerifyError(f"{out}: {len(damaged)} file(s) are not as they were written", problems)
    checkpoint = open_source(out)
    target = runtimes.find(manifest["runtime"])
    stored, problems = open_stored(checkpoint, target)
    reports, more = _reports(out, stored) if _has_report(manifest) else ({}, [])
    problems += [*checkpoint.anomalies, *checkpoint.slips, *more]
    if problems:
        raise VerifyError(f"{out}: {len(problems)} disagreement(s)", problems)
    chosen = stored if sample is None else _sample(stored, reports, sample)
    with one_torch_thread(), Files(checkpoint.stamps) as files:
        problems = list(_value_problems(chosen, files))
        if against is not None:
            problems += _against(stored, chosen, reports, target, files, open_source(against, links=links))
    for path, stamp in stamps.items():
        stamp.check(path)
    if problems:
        raise VerifyError(f"{out}: {len(problems)} tensor(s) are not as reported", problems)
    quantized = sum(not isinstance(s.codec, Keep) for s in stored)
    return Verified(len(manifest["files"]), len(stored), quantized, len(chosen), against is not None)


def _has_report(manifest: Mapping[str, Any]) -> bool:
    """All have one but the resharded files of others, whose errors nobody measured; those say so."""
    options = manifest.get("options")
    return FILENAME in manifest["files"] or not isinstance(options, dict) or options.get("report") is not False


def _by_name(out: Path, manifest: Mapping[str, Any], damaged: Mapping[str, str]) -> list[str]:
    """The weights that are not as they were written, as far as headers and report can still be read."""
    entries = manifest["files"]
    suspects = {
        out / n for n in damaged if n in entries and (out / n).is_file() and (out / n).stat().st_size == entries[n]["bytes"]
    }
    if FILENAME in damaged or not suspects:
        return []
    try:
        stored, _ = open_stored(open_source(out), runtimes.find(manifest["runtime"]))
        reports, _ = _reports(out, stored)
        with Files() as files:
            return list(damaged_weights(stored, reports, files, suspects))
    except ErnieQuantError as error:
        return [f"which weights are damaged cannot be said: {error}"]


def _sample(stored: list[Stored], reports: Mapping[str, TensorReport], count: int) -> list[Stored]:
    """About `count` weights: of every role and codec its share, at even distances, and the one that lost most."""
    groups: dict[tuple[str, str], list[Stored]] = {}
    for entry in stored:
        groups.setdefault((entry.rule.role, entry.codec.describe()), []).append(entry)
    chosen = []
    for members in groups.values():
        share = max(1, count * len(members) // len(stored))
        places = {i * len(members) // share for i in range(share)}
        worst = max(range(len(members)), key=lambda i: reports[members[i].name].rel_error if reports else 0.0)
        chosen += [members[i] for i in sorted(places | {worst})]
    return chosen


def _reports(out: Path, stored: list[Stored]) -> tuple[dict[str, TensorReport], list[str]]:
    """Weight -> its row of report.json, and where these are not what the files say. Raises VerifyError."""
    try:
        reports = {r["name"]: TensorReport.from_json(r) for r in read_object(out / FILENAME)["tensors"]}
    except (KeyError, TypeError):
        raise VerifyError(f"{out / FILENAME}: lacks the rows of its tensors", []) from None
    problems = [f"{n}: is in the report, not in the files" for n in reports.keys() - {s.name for s in stored}]
    for entry in stored:
        row = reports.get(entry.name)
        nbytes = sum(kinds.spec_of(part).nbytes for part in entry.parts.values())
        if row is None:
            problems.append(f"{entry.name}: is in the files, not in the report")
            continue
        said = (row.role, not row.changed, row.shape, row.bytes, row.bits_per_weight)
        bits = entry.codec.bits_per_weight(entry.spec)
        if said != (entry.rule.role, isinstance(entry.codec, Keep), entry.shape, nbytes, bits):
            problems.append(
                f"{entry.name}: the report says {row.role}, {row.codec} {row.shape} in {row.bytes} bytes, {row.bits_per_weight:g}"
                f" bits per weight; the files hold {entry.rule.role}, {entry.codec.describe()} {entry.shape} in {nbytes} bytes,"
                f" {bits:g} bits per weight"
            )
    return reports, problems


def _value_problems(chosen: list[Stored], files: Files) -> Iterator[str]:
    """Quantized weights must decode to finite numbers, and those to the same codes; copies in ranks must agree."""
    for entry in chosen:
        copied = any(isinstance(part, Replicated) for part in entry.parts.values())
        if isinstance(entry.codec, Keep) and not copied:
            continue
        try:
            problems = (_slab_problem(entry, files, rows) for rows in entry.slabs())
            if problem := next(filter(None, problems), None):
                yield problem
        except CheckpointError as error:
            yield str(error)


def _slab_problem(entry: Stored, files: Files, rows: tuple[int, int]) -> str | None:
    import torch

    encoded = entry.encoded(files, rows)
    weight = entry.codec.decode(encoded)
    if isinstance(entry.codec, Keep):
        return None
    if not bool(weight.isfinite().all()):
        return f"{entry.name}: rows {rows[0]} to {rows[1]} decode to NaN or infinity"
    again = entry.codec.recode(weight, encoded)["codes"]
    if not torch.equal(again.view(torch.uint8), encoded["codes"].view(torch.uint8)):
        return f"{entry.name}: rows {rows[0]} to {rows[1]} decode to weights whose codes are others; no codec wrote these"
    return None


def _against(
    stored: list[Stored], chosen: list[Stored], reports: Mapping[str, TensorReport], target: Runtime, files: Files,
    source: Checkpoint,
) -> list[str]:  # fmt: skip
    """Kept tensors have the source's bytes; decoded ones have the error that was reported; none is missing."""
    quantized = bool(evidence(source))  # the result was dequantized from it
    table = resolve_quantized(source) if quantized else resolve(source, frozenset(plain.FIXES))
    if table.problems:
        raise VerifyError(f"{source.folder}: the source itself has {len(table.problems)} problem(s)", table.problems)
    weights = {w.name: w for w in LAYOUTS[target.LAYOUT].join(table.weights)}
    there = {s.name for s in stored}
    problems = [f"{name}: is in the source, not in the result" for name in weights.keys() - there]
    problems += [f"{name}: is in the result, not in the source" for name in there - weights.keys()]
    chosen = [entry for entry in chosen if entry.name in weights]
    needs = [[ref.file for ref in build.refs(weights[entry.name].view)] for entry in chosen]
    with source.download(needs) as download:
        for number, entry in enumerate(chosen):
            with Files(download.stamps, download.path) as originals:
                try:
                    problems += _difference(entry, weights[entry.name], reports.get(entry.name), files, originals)
                    originals.check()
                except ErnieQuantError as error:
                    problems.append(str(error))
            download.done(number)
    return problems


def _difference(entry: Stored, weight: Weight, row: TensorReport | None, files: Files, originals: Files) -> list[str]:
    import torch

    view = oriented(weight, entry.codec, entry.layout)
    if view.shape != entry.shape:
        return [f"{entry.name}: is {entry.shape}, in the source {view.shape}"]
    if row is not None and set(row.sources) != set(weight.sources):
        said, is_ = ", ".join(row.sources), ", ".join(weight.sources)
        return [f"{entry.name}: the report says it comes from {said}, it comes from {is_}"]
    total = Difference()
    for span in entry.slabs():
        original = read(view, originals, span)
        result = entry.read(files, span)
        if isinstance(entry.codec, Keep):
            if original.dtype != result.dtype or not torch.equal(original.view(torch.uint8), result.view(torch.uint8)):
                return [f"{entry.name}: should be the source's bytes, and is not"]
        else:
            total += compare(entry.name, original, result)
    return [] if row is None else list(_misreported(entry.name, total, row))


def _misreported(name: str, total: Difference, row: TensorReport) -> Iterator[str]:
    """The first figure of the report that is not what the files give."""
    for what, is_, said in (
        ("relative error", total.rel_error, row.rel_error),
        ("largest error", total.largest, row.max_abs_error),
        ("squared error", total.error, row.squared_error),
        ("squared norm", total.total, row.squared_norm),
        ("SQNR in dB", total.sqnr_db or 0.0, row.sqnr_db or 0.0),
    ):
        if abs(is_ - said) > TOLERANCE * max(1.0, abs(said)) or not math.isfinite(is_):
            yield f"{name}: its {what} is {is_:.6g}, the report says {said:.6g}"
            return


def as_json(result: Verified) -> dict[str, Any]:
    """For --json."""
    return {"status": "verified", **asdict(result)}
