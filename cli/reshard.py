"""`ernie-quant reshard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options


@click.command()
@_options.source
@_options.out
@click.option("--tp", type=click.IntRange(1, 64), required=True, help="Tensor-parallel size of the result.")
@_options.write_options
def command(
    src: Path | str, out: Path, tp: int, max_shard_size: int, copy: tuple[str, ...], copy_code: bool, follow_links: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Turn a prequantized FastDeploy checkpoint of one tensor-parallel size into another, without loss.

    Reads and writes rank0/, rank1/, … or, for size 1, a plain folder; published files too. The weights that FastDeploy
    computes with stay the same to the bit.

    \b
    ernie-quant reshard ERNIE-4.5-300B-A47B-2Bits-Paddle out --tp 2
    """
    from ernie_quant.planning.reshard import make_reshard_plan
    from ernie_quant.sources import open_source

    source = open_source(src, links=follow_links)
    plan = make_reshard_plan(source, tp, shard_bytes=max_shard_size, copy=copy, copy_code=copy_code)
    _execute.run(plan, out, **options)
