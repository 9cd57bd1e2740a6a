"""Read a result back from disk and check everything that can be known about it.

Nothing is taken from the run: names and shapes follow from the architecture's table, the form of every tensor from
config.json, the values from the files. The report and the manifest are what is checked, not what is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ernie_quant import names, runtimes
from ernie_quant.check.against import compare_with, same_bits
from ernie_quant.check.compared import Compared, Outcome, tally
from ernie_quant.check.integrity import Progress, damaged_files, damaged_weights
from ernie_quant.check.soundness import Odd, odd
from ernie_quant.checkpoint import Checkpoint, Stamp
from ernie_quant.codecs.keep import Keep
from ernie_quant.errors import CheckpointError, ErnieQuantError, VerifyError
from ernie_quant.jsonio import read_object
from ernie_quant.measure import Values, values_of
from ernie_quant.paths import weight_folders
from ernie_quant.reporting.rows import FILENAME, TensorReport
from ernie_quant.result.manifest import read_manifest
from ernie_quant.runtimes import Runtime
from ernie_quant.sources import open_source
from ernie_quant.threads import default_workers, one_torch_thread, ordered
from ernie_quant.views import kinds
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Replicated
from ernie_quant.weights.stored import Stored, linears_of, open_stored

AT_ONCE = 1 << 20  # bytes of a weight whose values are looked at
NO_SOURCE, NOT_SAMPLED = "no source", "not in the sample"  # why a tensor was not compared


@dataclass(frozen=True)
class Verified:
    """What was checked: all files by hash, all tensors by name, shape and form; and of how many the values, in what way."""

    files: int
    tensors: int
    quantized: int
    sampled: int  # tensors whose values were asked for
    recoded: int  # of these the quantized ones: they decode to finite numbers, and those to the same codes
    against: bool
    compared: Compared = field(default_factory=Compared)  # with the source
    not_compared: Mapping[str, int] = field(default_factory=dict)  # why -> how many tensors
    odd: Odd = field(default_factory=Odd)  # what no sound model has, but this one's source


def verify(
    out: Path, against: Path | str | None = None, progress: Progress = lambda _: None, sample: int | None = None, *,
    links: bool = False,
) -> Verified:  # fmt: skip
    """Check the result in `out`, and with `against` its tensors against the source. Raises VerifyError.

    Values are checked of `sample` tensors (None: of all): quantized ones must decode to finite numbers whose codes are
    the same again; what they are compared with, where there is a source (its `links` are followed if asked for),
    `against.kind_of` says.
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
    problems += [*checkpoint.anomalies, *checkpoint.slips, *more, *_misread(checkpoint, target, stored)]
    if problems:
        raise VerifyError(f"{out}: {len(problems)} disagreement(s)", problems)
    chosen = stored if sample is None else _sample(stored, reports, sample)
    with one_torch_thread(), Files(checkpoint.stamps) as files:
        unsound, values = _values(chosen, files, kept=against is None)
        problems = list(unsound.values())
        outcomes: list[Outcome] = []
        if against is not None:
            sound = [entry for entry in chosen if entry.name not in unsound]
            outcomes, more = compare_with(open_source(against, links=links), target, stored, sound, reports, files)
            problems += more + [outcome.problem for outcome in outcomes if outcome.problem]
        found, more = odd({name: of for name, of in values.items() if name not in unsound}, outcomes, reports)
        problems += more
    for path, stamp in stamps.items():
        stamp.check(path)
    if problems:
        raise VerifyError(f"{out}: {len(problems)} tensor(s) are not what they should be", problems)
    compared = tally(outcomes)
    assert against is None or compared.total == len(chosen), "a tensor was compared with nothing"
    return Verified(
        len(manifest["files"]), len(stored), _quantized(stored), len(chosen), _quantized(chosen), against is not None,
        compared, _not_compared(len(stored), compared.total, against is not None), found,
    )  # fmt: skip


def _misread(checkpoint: Checkpoint, target: Runtime, stored: list[Stored]) -> list[str]:
    """Layers that a program would read otherwise, because it knows them by names that config.json forgets."""
    entry = checkpoint.config.get("quantization_config")
    return target.misread(entry, linears_of(stored)) if entry else []


def _quantized(entries: list[Stored]) -> int:
    return sum(not isinstance(entry.codec, Keep) for entry in entries)


def _not_compared(tensors: int, compared: int, against: bool) -> dict[str, int]:
    left = tensors - compared
    return {NOT_SAMPLED if against else NO_SOURCE: left} if left else {}


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
    unknown = sorted(reports.keys() - {s.name for s in stored}, key=names.natural)
    problems = [f"{name}: is in the report, not in the files" for name in unknown]
    for entry in stored:
        row = reports.get(entry.name)
        nbytes = sum(kinds.spec_of(part).nbytes for part in entry.parts.values())
        if row is None:
            problems.append(f"{entry.name}: is in the files, not in the report")
            continue
        said = (row.role, row.plain, row.shape, row.bytes, row.bits_per_weight)
        bits = entry.codec.bits_per_weight(entry.spec)
        if said != (entry.rule.role, isinstance(entry.codec, Keep), entry.shape, nbytes, bits):
            problems.append(
                f"{entry.name}: the report says {row.role}, {row.codec} {row.shape} in {row.bytes} bytes, {row.bits_per_weight:g}"
                f" bits per weight; the files hold {entry.rule.role}, {entry.codec.describe()} {entry.shape} in {nbytes} bytes,"
                f" {bits:g} bits per weight"
            )
    return reports, problems


def _values(chosen: list[Stored], files: Files, kept: bool) -> tuple[dict[str, str], dict[str, Values]]:
    """Weight -> what is wrong with its values, and weight -> what is odd about them.

    Quantized ones must decode to finite numbers, copies in ranks must agree. `kept`: look at the values of kept ones, too.
    """
    looked_at = [entry for entry in chosen if kept or not isinstance(entry.codec, Keep) or _has_copies(entry)]
    problems: dict[str, str] = {}
    values: dict[str, Values] = {}
    found = ordered(lambda entry: _values_of(entry, files), looked_at, default_workers())
    for entry, of in zip(looked_at, found, strict=True):
        if isinstance(of, str):
            problems[entry.name] = of
        else:
            values[entry.name] = of
    return problems, values


def _has_copies(entry: Stored) -> bool:
    return any(isinstance(part, Replicated) for part in entry.parts.values())


def _values_of(entry: Stored, files: Files) -> Values | str:
    """What is odd about a weight, or what is wrong with it; some rows at a time, which stay in the cache."""
    try:
        return sum((_slab_values(entry, files, rows) for rows in entry.slabs(AT_ONCE)), Values())
    except (CheckpointError, _Problem) as error:
        return str(error)


class _Problem(Exception):
    """What is wrong with the values of a weight."""


def _slab_values(entry: Stored, files: Files, rows: tuple[int, int]) -> Values:
    packed = entry.packed(files, rows)
    if isinstance(entry.codec, Keep):
        return values_of(next(iter(packed.values())))
    for part, tensor in packed.items():  # a scale that belongs to no output is one of activations, by which programs divide
        if (
            entry.expected[part].out_axis is None
            and tensor.is_floating_point()
            and not bool(((tensor > 0) & tensor.isfinite()).all())
        ):
            raise _Problem(f"{part}: holds what is no scale: not a finite number above 0")
    encoded = entry.target.unpack(entry.name, entry.codec, packed)
    constants = entry.target.constants(entry.name, entry.codec, entry.spec, encoded)
    repacked = constants | entry.target.pack(entry.name, entry.codec, encoded)
    if other := next((part for part in repacked if not same_bits(packed[part], repacked[part])), None):
        raise _Problem(f"{other}: is not what packing the codes of {entry.name} gives; a runtime may read it otherwise")
    weight = entry.codec.decode(encoded)
    values = values_of(weight)
    if values.not_finite:
        raise _Problem(f"{entry.name}: rows {rows[0]} to {rows[1]} decode to NaN or infinity")
    again = entry.codec.recode(weight, encoded)
    if not all(same_bits(again[field], encoded[field]) for field in encoded):
        raise _Problem(
            f"{entry.name}: rows {rows[0]} to {rows[1]} decode to weights whose codes are others; no codec wrote these"
        )
    return values


def as_json(result: Verified) -> dict[str, Any]:
    """For --json."""
    return {"status": "verified", **asdict(result)}
