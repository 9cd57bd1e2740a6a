"""`ernie-quant wint2`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options

from ernie_quant.planning import built_in


@click.command()
@_options.source
@_options.out
@_options.runtime("wint2")
@_options.wint4_layers("Experts of layers below this one are WINT4, the others WINT2.")
@click.option(
    "--effort", type=click.Choice(["1", "4", "16"]), default=str(built_in.EFFORT), show_default=True,
    help="Codes tried per output channel: 1 is twice as fast as 16, for up to 3% more error.",
)  # fmt: skip
@_options.tp
@_options.experts_only
@_options.scale
@_options.unsupported
@_options.calibration
@_options.device
@_options.run_options
def command(src: Path | str, out: Path, **options: Any) -> None:
    """Quantize the experts to 2 bits (CCQ), for FastDeploy.

    Paddle layout: experts WINT2 or, in the first layers, WINT4; every other linear WINT8; router, norms, embeddings
    and head are kept. The MTP block goes to a folder of its own, OUT/mtp.

    \b
    ernie-quant wint2 ERNIE-4.5-300B-A47B-Paddle out
    """
    _execute.refuse_experts_only(options)
    _execute.built_in("wint2", src, out, settings=_options.settings("wint2", options), **options)
