"""`ernie-quant verify`."""

from __future__ import annotations

from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli.main import print_json, return_freed_memory


@click.command()
@_options.out
@click.option("--against", type=_options.FOLDER, help="The source: compare every tensor with it.")
@_options.quiet
@_options.json_option
def command(out: Path, against: Path | None, quiet: bool, as_json: bool) -> None:
    """Read a result back from disk: hashes, index, headers, config and values must agree.

    With --against, every kept tensor must have the source's bytes, and every quantized one the reported error.

    \b
    ernie-quant verify out --against ERNIE-4.5-21B-A3B-Paddle
    """
    from ernie_quant import verify

    return_freed_memory()
    size = sum(p.stat().st_size for p in out.glob("*")) if out.is_dir() else 0
    with progress_bar(size, "bytes", quiet) as progress:
        result = verify.verify(out, against, progress)
    if as_json:
        print_json(verify.as_json(result))
        return
    compared = f" Every tensor agrees with {against}." if against else ""
    click.echo(f"{out}: verified: {result.files} files, {result.tensors} tensors, {result.quantized} quantized.{compared}")
