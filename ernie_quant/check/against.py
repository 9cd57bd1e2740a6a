"""Every tensor of a result beside its source: `kind_of` decides what it is compared with, one function compares each kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.check import unreported
from ernie_quant.check.compared import DECODED, FITTED, KEPT, MEASURED, REPORTED, ROUNDED, STORED, Outcome
from ernie_quant.check.integrity import altered
from ernie_quant.checkpoint import Checkpoint, TensorSpec
from ernie_quant.codecs._rounded import rounded
from ernie_quant.codecs.keep import Keep
from ernie_quant.dtypes import TORCH_NAMES
from ernie_quant.errors import ErnieQuantError, VerifyError
from ernie_quant.measure import Difference, Values, compare, values_of
from ernie_quant.names import Weight, natural
from ernie_quant.planning.as_stored import fits
from ernie_quant.planning.choose import oriented
from ernie_quant.reporting.rows import TensorReport
from ernie_quant.runtimes import Runtime
from ernie_quant.views import build
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View, spec_of
from ernie_quant.views.read import read, slabs
from ernie_quant.weights import plain
from ernie_quant.weights.claims import evidence
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.pieces import between, encoded_of, pieces_of
from ernie_quant.weights.plain import resolve
from ernie_quant.weights.stored import Stored, resolve_quantized

if TYPE_CHECKING:
    import torch

SHOULD_BE = {KEPT: "the source's bytes", ROUNDED: "the source's values in {dtype}", DECODED: "what the source decodes to"}
TOLERANCE = 1e-9  # of a relative error, which is computed by the same sums again


@dataclass(frozen=True)
class Pair:
    """A tensor of the result, the view of the source's that it was made of, and its row in the report."""

    entry: Stored
    view: View  # as the codec sees it
    row: TensorReport | None
    sources: tuple[str, ...]
    resharded: bool  # both sides are quantized, so the report speaks of another source: the first one


def compare_with(
    source: Checkpoint, target: Runtime, stored: Sequence[Stored], chosen: Sequence[Stored],
    reports: Mapping[str, TensorReport], files: Files,
) -> tuple[list[Outcome], list[str]]:  # fmt: skip
    """The chosen tensors beside those of the source, and names that one side lacks. Raises VerifyError, ErnieQuantError."""
    weights, quantized = _weights(source, target)
    there = {entry.name for entry in stored}
    problems = [f"{name}: is in the source, not in the result" for name in sorted(weights.keys() - there, key=natural)]
    problems += [f"{name}: is in the result, not in the source" for name in sorted(there - weights.keys(), key=natural)]
    resharded = quantized and any(not isinstance(entry.codec, Keep) for entry in stored)
    # the report of what was moved speaks of a quantized source, or of the one before that
    measured = {} if resharded or any(row.as_stored for row in reports.values()) else reports
    pairs = [_pair(entry, weights[entry.name], measured.get(entry.name), resharded) for entry in chosen if entry.name in weights]
    outcomes = []
    with source.download([[ref.file for ref in build.refs(pair.view)] for pair in pairs]) as download:
        for number, pair in enumerate(pairs):
            with Files(download.stamps, download.path) as originals:
                outcomes.append(_outcome(pair, files, originals))
            download.done(number)
    return outcomes, problems


def _weights(source: Checkpoint, target: Runtime) -> tuple[dict[str, Weight], bool]:
    """The source's weights under the names of the result, and whether they are quantized. Raises VerifyError."""
    quantized = bool(evidence(source))
    table = resolve_quantized(source) if quantized else resolve(source, frozenset(plain.FIXES))
    if table.problems:
        raise VerifyError(f"{source.folder}: the source itself has {len(table.problems)} problem(s)", table.problems)
    return {w.name: w for w in LAYOUTS[target.LAYOUT].join(table.weights)}, quantized


def _pair(entry: Stored, weight: Weight, row: TensorReport | None, resharded: bool) -> Pair:
    return Pair(entry, oriented(weight, entry.codec, entry.layout), row, weight.sources, resharded)


def kind_of(pair: Pair) -> str:
    """What a tensor is compared with; there is no kind that is compared with nothing."""
    if isinstance(pair.entry.codec, Keep):
        if build.decodes(pair.view):
            return DECODED
        if pair.row is not None and pair.row.changed and pair.entry.rule.linear:
            return FITTED
        return ROUNDED if _may_be_rounded(pair.entry, spec_of(pair.view)) else KEPT
    if pair.resharded:
        return STORED
    return MEASURED if pair.row is None else REPORTED


def _may_be_rounded(entry: Stored, source: TensorSpec) -> bool:
    """Has a kept weight another dtype than the source's, and would its runtime want that?"""
    if entry.spec.dtype == source.dtype:
        return False
    return entry.target.CASTS or entry.spec.dtype == entry.target.kept_as(entry.rule.role, source, quantized=True)


def _outcome(pair: Pair, files: Files, originals: Files) -> Outcome:
    """What came of a comparison; what cannot be read is wrong too."""
    try:
        outcome = _compared(pair, kind_of(pair), files, originals)
        originals.check()
    except ErnieQuantError as error:
        return Outcome(pair.entry.name, kind_of(pair), str(error))
    return outcome


def _compared(pair: Pair, kind: str, files: Files, originals: Files) -> Outcome:
    entry, row = pair.entry, pair.row
    if pair.view.shape != entry.shape:
        return Outcome(entry.name, kind, f"{entry.name}: is {entry.shape}, in the source {pair.view.shape}")
    if row is not None and set(row.sources) != set(pair.sources):
        said, is_ = ", ".join(row.sources), ", ".join(pair.sources)
        return Outcome(entry.name, kind, f"{entry.name}: the report says it comes from {said}, it comes from {is_}")
    if kind in (KEPT, ROUNDED, DECODED):
        return _kept(pair, kind, files, originals)
    if kind == FITTED and row is not None:
        return _fitted(pair, row, files, originals)
    if kind == STORED:
        return Outcome(entry.name, kind, _stored_problem(pair, files, originals))
    if row is not None:
        difference = sum((compare(entry.name, *both) for both in _slabs(pair, files, originals)), Difference())
        return Outcome(entry.name, kind, next(_misreported(entry.name, difference, row), ""))
    judged = unreported.judge(entry, pair.view, files, originals)
    problem = unreported.problem(entry.name, entry.codec, entry.spec, judged)
    return Outcome(entry.name, kind, problem, judged.difference, nearest=not judged.far)


def _slabs(pair: Pair, files: Files, originals: Files) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The source's rows and the result's."""
    return ((read(pair.view, originals, rows), pair.entry.read(files, rows)) for rows in pair.entry.slabs())


def _kept(pair: Pair, kind: str, files: Files, originals: Files) -> Outcome:
    name, values, difference = pair.entry.name, Values(), Difference()
    for original, there in _slabs(pair, files, originals):
        expected = rounded(original, there.dtype) if kind == ROUNDED else original
        if not same_bits(expected, there):
            should_be = SHOULD_BE[kind].format(dtype=TORCH_NAMES[pair.entry.spec.dtype])
            return Outcome(name, kind, f"{name}: should be {should_be}, and is not")
        values += values_of(there)
        if kind == ROUNDED:
            difference += compare(name, original, there)
    problem = next(_misreported(name, difference, pair.row), "") if pair.row else ""
    return Outcome(name, kind, problem, values=values)


def _fitted(pair: Pair, row: TensorReport, files: Files, originals: Files) -> Outcome:
    """A kept weight that text has changed: the bytes that were written, as far from the source as the report says."""
    name, values, difference = pair.entry.name, Values(), Difference()
    for original, there in _slabs(pair, files, originals):
        values += values_of(there)
        if values.not_finite:
            return Outcome(name, FITTED, f"{name}: was fitted to text, and holds NaN or infinity")
        difference += compare(name, original, there)
    problems = [*_misreported(name, difference, row, least=0.0), *altered(pair.entry, row, files)]
    return Outcome(name, FITTED, next(iter(problems), ""), difference, values=values)


def _stored_problem(pair: Pair, files: Files, originals: Files) -> str:
    """What moves quantized weights changes no bit: codes and scales are those of the source, field by field."""
    entry, pieces = pair.entry, pieces_of(pair.view)
    if not fits(entry.codec, pieces):
        is_ = " and ".join(dict.fromkeys(piece.stored.codec.form for piece in pieces))
        is_ = is_ or ("quantized in other pieces" if build.decodes(pair.view) else "kept")
        return f"{entry.name}: is {entry.codec.form}, in the source {is_}; compare it with what it was made from"
    if odd_piece := next((piece for piece in pieces if not piece.whole_bytes), None):
        return f"{entry.name}: begins amid bytes of {odd_piece.stored.name}; compare it with what it was made from"
    multiple = math.lcm(entry.codec.rows, entry.target.ROWS, *(piece.stored.target.ROWS for piece in pieces))
    for rows in slabs(entry.spec, multiple):
        ours, theirs = entry.encoded(files, rows), encoded_of(between(pieces, *rows), originals)
        if odd := [field for field in ours if not same_bits(theirs[field], ours[field])]:
            return (
                f"{entry.name}: rows {rows[0]} to {rows[1]} have not the source's {' and '.join(odd)}; nothing should change any"
            )
    return ""


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (one, other)))


def _misreported(name: str, total: Difference, row: TensorReport, least: float = 1.0) -> Iterator[str]:
    """The first figure of the report that is not what the files give, to `TOLERANCE` of it or of `least`."""
    for what, is_, said in (
        ("relative error", total.rel_error, row.rel_error),
        ("largest error", total.largest, row.max_abs_error),
        ("squared error", total.error, row.squared_error),
        ("squared norm", total.total, row.squared_norm),
        ("SQNR in dB", total.sqnr_db or 0.0, row.sqnr_db or 0.0),
    ):
        if abs(is_ - said) > TOLERANCE * max(least, abs(said)) or not math.isfinite(is_):
            yield f"{name}: its {what} is {is_:.6g}, the report says {said:.6g}"
            return
