"""`ernie-quant verify`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource
from ernie_quant.cli import _options
from ernie_quant.cli._execute import return_freed_memory
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json

SAMPLE = 100


@click.command()
@_options.out
@click.option("--against", type=_options.Source(), help="The source: compare every tensor with it.")
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
    bytes and quantized ones the reported error.

    \b
    ernie-quant verify out --against ERNIE-4.5-21B-A3B-Paddle
    """
    from ernie_quant.check import verify

    if full and ctx.get_parameter_source("sample") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--sample does not go with --full")
    return_freed_memory()
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0
    with progress_bar(size, quiet) as progress:
        result = verify.verify(out, against, progress, None if full else sample, links=follow_links)
    if as_json:
        print_json(verify.as_json(result))
        return
    click.echo(f"{out}: verified: {result.files} files, {result.tensors} tensors, {result.quantized} quantized.", nl=False)
    click.echo(f" {_compared(result.sampled, result.tensors, against)}")


def _compared(sampled: int, tensors: int, against: Path | str | None) -> str:
    if against is None:
        return "All values are sound." if sampled == tensors else f"The values of {sampled} are sound."
    return f"Every tensor agrees with {against}." if sampled == tensors else f"{sampled} tensors agree with {against}."
