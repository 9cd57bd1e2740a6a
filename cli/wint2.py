"""`ernie-quant wint2`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _options


@click.command()
@_options.source
@_options.out
@click.option("--runtime", type=click.Choice(["fastdeploy"]), default="fastdeploy", show_default=True, help="Who can load it.")
@click.option(
    "--wint4-layers", type=click.IntRange(0, 1000), default=7, show_default=True,
    help="Experts of layers below this one are WINT4, the others WINT2.",
)  # fmt: skip
@click.option(
    "--effort", type=click.Choice(["1", "4", "16"]), default="16", show_default=True,
    help="Codes tried per output channel: 1 is twice as fast as 16, for up to 3% more error.",
)  # fmt: skip
@click.option("--tp", type=click.IntRange(1, 16), default=1, show_default=True, help="Tensor-parallel size: writes rank0/, ….")
@_options.experts_only
@_options.scale
@_options.unsupported
@_options.run_options
def command(src: Path | str, out: Path, runtime: str, wint4_layers: int, effort: str, **options: Any) -> None:
    """Quantize the experts to 2 bits (CCQ), for FastDeploy.

    Paddle layout: experts WINT2 or, in the first layers, WINT4; every other linear WINT8; router, norms, embeddings
    and head are kept. The MTP block goes to a folder of its own, OUT/mtp.

    \b
    ernie-quant wint2 ERNIE-4.5-300B-A47B-Paddle out
    """
    _options.quantize_container("wint2", wint4_layers, src, out, effort=int(effort), **options)
