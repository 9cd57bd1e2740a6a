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
@_options.experts_only
@_options.group_size
@_options.scale
@_options.mtp
@_options.keep_unfit
@_options.tp
@_options.unsupported
@_options.calibration
@_options.device
@_options.run_options
@click.pass_context
def command(ctx: click.Context, /, src: Path | str, out: Path, **options: Any) -> None:
    """Quantize the experts to 2 bits (CCQ), for FastDeploy, or for vLLM with the plug-in that comes with ernie-quant.

    Experts are WINT2 or, in the first layers, WINT4; every other linear is WINT8; router, norms, embeddings and head
    are kept. FastDeploy has no loader for VL models in 2 bits, vLLM has. For FastDeploy the MTP block goes to a folder
    of its own, OUT/mtp. Other layers in other bits: `ernie-quant quantize --recipe`.

    \b
    ernie-quant wint2 ERNIE-4.5-300B-A47B-Paddle out
    ernie-quant wint2 ERNIE-4.5-VL-424B-A47B-PT out --runtime vllm
    """
    _execute.drop_unfit(ctx, "wint2", options)
    _execute.built_in("wint2", src, out, settings=_options.settings("wint2", options), **options)
