"""The tables of `plan`, 80 columns wide, and what explains them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ernie_quant.planning.gpus import GIB

if TYPE_CHECKING:
    from ernie_quant.planning.capacity import Estimate, Row
    from ernie_quant.planning.fit import Fit
    from ernie_quant.planning.gpus import Gpu, Limits

WIDTH, FORM = 80, 42


def lines(found: Estimate, limits: Limits, gpus: Sequence[Gpu], count: int | None, cores: int) -> Iterator[str]:
    """All that is shown."""
    if count is not None:
        heads: tuple[str, ...] = (" GiB", "shared", "each", "context", "seqs")
        widths = [6, 13, 6, 8, 5]
        cells = {id(row): _of_many(row) for row in found.rows}
    elif len(gpus) > 1:
        heads = (" GiB", *(gpu.name.removesuffix("GiB") for gpu in gpus))
        widths = [6, *(max(4, len(head) + 1) for head in heads[1:])]
        cells = {id(row): (_gib(row.weight_bytes), *map(_count, row.fits)) for row in found.rows}
    else:
        heads = ("GiB", "GPUs", "GiB each", "seqs", "tok/s", "hours")
        widths = [6, 5, 9, 5, 7, 6]
        cells = {id(row): _of_few(row, cores) for row in found.rows}
    yield from _wrapped(_title(limits, gpus, count))
    yield ""
    yield " " * FORM + "".join(head.rjust(width) for head, width in zip(heads, widths, strict=True)).rstrip()
    program = ""
    for row in found.rows:
        if row.program != program:
            program = row.program
            yield program
        yield from _line(row.form, "".join(cell.rjust(width) for cell, width in zip(cells[id(row)], widths, strict=True)))
    yield ""
    for part in _explained(found, limits, gpus, count, cores):
        yield from _wrapped(part)


def _title(limits: Limits, gpus: Sequence[Gpu], count: int | None) -> str:
    many = "GPUs" if count is None else f"{count} GPU{'s' if count > 1 else ''}"
    rooms = ", ".join(f"{gpu.name}: {limits.usable(gpu) / GIB:.1f} GiB usable" for gpu in gpus)
    return f"{many} of {rooms} ({limits.utilization:g} of the memory less {limits.reserve / GIB:.1f} GiB)"


def _line(form: str, cells: str) -> Iterator[str]:
    """A form that is too long for its column stands on a line of its own."""
    if len(form) + 1 > FORM:
        yield f" {form}"
        form = ""
    yield f" {form}".ljust(FORM) + cells


def _of_few(row: Row, cores: int) -> tuple[str, ...]:
    (fit,) = row.fits
    hours = "" if row.core_hours is None else f"{row.core_hours / cores:.1f}"
    if not fit.gpus:
        return (_gib(row.weight_bytes), "-", "", "", "", hours)
    speed = _bound(fit.tokens_per_second)
    return (_gib(row.weight_bytes), _count(fit), _gib(fit.weight_bytes_per_gpu), str(fit.sequences), speed, hours)


def _bound(speed: float) -> str:
    """`<559`; of toys `<36M`."""
    if not speed:
        return ""
    return f"<{speed:.0f}" if speed < 99_999 else f"<{speed / 1e6:.3g}M"


def _of_many(row: Row) -> tuple[str, ...]:
    (fit,) = row.fits
    if fit.spread is None:
        return (_gib(row.weight_bytes), "-", "", "", "")
    shared = fit.spread.describe().replace(", ", "+").replace("one GPU", "")
    return (_gib(row.weight_bytes), shared, _gib(fit.weight_bytes_per_gpu), str(fit.context), str(fit.sequences))


def _count(fit: Fit) -> str:
    if fit.spread is None:
        return "-"
    return f"{fit.gpus}{'E' if fit.spread.experts_whole else 'P' if fit.spread.stages > 1 else ''}"


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f}"


def _explained(found: Estimate, limits: Limits, gpus: Sequence[Gpu], count: int | None, cores: int) -> Iterator[str]:
    rows = found.rows
    per_token = rows[0].kv_bytes_per_token
    enough = f"room for the weights and {'a' if count else 'one'} sequence of {limits.max_model_len} tokens"
    yield f"KV cache ({limits.kv_dtype}): {per_token} bytes per token; {enough}, at most {limits.max_num_seqs} at once."
    if any(row.command for row in rows):
        yield "A row NAME OPTIONS is the command ernie-quant NAME SRC OUT OPTIONS."
    if any(row.at_load for row in rows):
        yield "A row --quantization … is an option of the program, which does that itself when it loads a plain checkpoint."
    marks = "".join(_count(fit) for row in rows for fit in row.fits)
    if count is None and "E" in marks:
        yield "E: experts whole, some on each GPU (vllm serve --enable-expert-parallel)."
    if count is None and "P" in marks:
        yield "P: whole layers, some on each GPU (vllm serve --pipeline-parallel-size N; llama.cpp does so by itself)."
    if count is None and len(gpus) == 1:
        if any(fit.tokens_per_second for row in rows for fit in row.fits):
            yield (
                f"tok/s: no sequence can be faster, by the bytes that a token reads and {gpus[0].bandwidth / 1e9:.0f} GB/s;"
                " a bound, not a promise."
            )
        if any(row.core_hours is not None for row in rows):
            yield f"hours: to make it on {cores} cores, roughly (machines differ by a factor of 4); it takes GiB of disk."
    if any(row.per_rank and fit.gpus > 1 for row in rows for fit in row.fits):
        yield "FastDeploy's quantized files are made for N GPUs: add --tp N, or ernie-quant reshard them later."
    yield from _fewer(rows) if count is None and len(gpus) == 1 else ()
    yield from _reasons(rows)
    yield from _refused(found.refused)


def _fewer(rows: Sequence[Row]) -> Iterator[str]:
    """Where stages need fewer GPUs."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for fit in row.fits:
            if fit.stages:
                found.setdefault(f"{fit.stages.gpus} GPUs ({fit.stages.describe()})", []).append(row.form)
    for many, forms in found.items():
        yield f"Slower, in stages (vllm serve --pipeline-parallel-size), {many} do for: {', '.join(forms)}."


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why there is no number, forms and GPUs together that lack it alike."""
    found: dict[str, list[str]] = {}
    for row in rows:
        need: dict[str, list[str]] = {}
        for fit in row.fits:
            what, comma, usable = fit.why.rpartition(", ")
            if fit.why:
                need.setdefault(what or usable, []).extend([f"{usable.split()[0]} of {fit.gpu}"] if comma else [])
        for what, rooms in need.items():
            found.setdefault(f"{what}; usable: {', '.join(rooms)}" if rooms else what, []).append(row.form)
    for why, forms in found.items():
        yield f"-: {', '.join(forms)}: {why}."


def _refused(refused: Mapping[str, str]) -> Iterator[str]:
    """What cannot be made, by reason."""
    by_reason: dict[str, list[str]] = {}
    for form, why in refused.items():
        by_reason.setdefault(why, []).append(form)
    for why, forms in by_reason.items():
        yield f"not possible: {', '.join(forms)}: {why}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
