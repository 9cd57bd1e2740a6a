"""`ernie-quant verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource
from ernie_quant.cli import _options
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ernie_quant.check.soundness import Odd
    from ernie_quant.check.verify import Verified

SAMPLE = 100
HINTS = {"no source": " (--against SRC)", "not in the sample": " (--full)"}


@click.command()
@_options.out
@click.option("--against", type=_options.Source(), help="The source: compare tensors with it, of a sample or all.")
@_options.follow_links
@click.option(
    "--sample", type=click.IntRange(1), default=SAMPLE, show_default=True,
    help="About so many tensors' values are checked, of every role and codec its share.",
)  # fmt: skip
@click.option("--full", is_flag=True, help="Check the values of all tensors.")
@_options.quiet
@_options.json_option
@click.pass_context
def command(
    ctx: click.Context, out: Path, against: Path | str | None, follow_links: bool, sample: int, full: bool, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Read a result back from disk: hashes, index, headers, config and values must agree.

    Every file is hashed; a changed byte is reported with the name of its weight. Of a sample, or of all with --full,
    the codes must decode to finite weights with the same codes; with --against, kept tensors must have the source's
    bytes, quantized ones and those that calibration has fitted the reported error, which is computed again. What has no
    report (ranks of files that others published) must have an error that its codec makes; beside the quantized checkpoint
    that was resharded, its codes and scales. What was compared with what is said line by line, and so is what was not.

    \b
    ernie-quant verify out --against ERNIE-4.5-21B-A3B-Paddle
    """
    from ernie_quant.check import verify
    from ernie_quant.run.memory import return_freed_memory

    if full and ctx.get_parameter_source("sample") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--sample does not go with --full")
    return_freed_memory()
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0
    with progress_bar(size, quiet) as progress:
        result = verify.verify(out, against, progress, None if full else sample, links=follow_links)
    if as_json:
        print_json(verify.as_json(result))
        return
    click.echo(f"{out}: {_headline(result.odd)}: {result.files} files, {result.tensors} tensors, {result.quantized} quantized")
    for line in _lines(result, str(against)):
        click.echo(f"  {line}")


def _headline(odd: Odd) -> str:
    """NaN is no model; a router of zeros may be meant so, and is no praise either."""
    if odd.not_finite:
        return "verified, but the model is not sound"
    return "verified, with weights of nothing but zeros" if odd.only_zeros else "verified"


def _odd(odd: Odd, source: str) -> Iterator[str]:
    """What no sound model has, and who says that it must be so here."""
    from ernie_quant.reporting.rows import some

    for names, what in ((odd.not_finite, "NaN or infinity"), (odd.only_zeros, "nothing but zeros")):
        for who, words in (("source", f", as {source} does"), ("report", ", as the report says"), ("", "")):
            if found := [name for name, says in names.items() if says == who]:
                yield f"{len(found)} {'holds' if len(found) == 1 else 'hold'} {what}{words}: {some(found)}"


def _lines(result: Verified, source: str) -> Iterator[str]:
    """What was checked of the values: of how many tensors, and what."""
    found = result.compared
    if result.recoded:
        of = "" if result.recoded == result.quantized else f" of {result.quantized}"
        yield f"{result.recoded}{of} quantized: decode to finite weights, and these to the same codes"
    if found.kept:
        yield f"{found.kept} kept: bit for bit those of {source}"
    if found.rounded:
        yield f"{found.rounded} kept, in another dtype: the nearest to those of {source}"
    if found.decoded:
        yield f"{found.decoded} kept: bit for bit what {source} decodes to"
    if found.fitted:
        yield f"{found.fitted} kept, fitted by calibration: change recomputed from {source}, it is the reported one"
    if found.stored:
        yield f"{found.stored} quantized: codes and scales are those of {source}"
    if found.reported:
        yield f"{found.reported} quantized: error recomputed from {source}, it is the reported one"
    if found.measured:
        yield f"{found.measured} quantized, without a report: relative error {found.rel_error:.3g} to {source}"
        yield f"  at most {found.worst_rel_error:.3g}, of {found.worst}"
    if found.nearest:
        yield f"  {found.nearest} of these: no code could be nearer to {source} at its scale"
    if others := found.measured - found.nearest:
        yield f"  {others} of these: other codes, as calibration or another rounding chooses; only large errors would show"
    yield from _odd(result.odd, source)
    for why, count in result.not_compared.items():
        yield f"{count} not compared: {why}{HINTS.get(why, '')}"
