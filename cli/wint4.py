"""`ernie-quant wint4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options

from ernie_quant.planning import packed


@click.command()
@_options.source
@_options.out
@_options.experts_only
@_options.group_size
@_options.scale
@click.option(
    "--activations", type=click.Choice(packed.ACTIVATIONS), default=packed.ACTIVATIONS[0], show_default=True,
    help="Inputs of the weights: as they are, or rounded to float8 by vLLM, on Hopper only (W4AFP8).",
)  # fmt: skip
@_options.runtime("wint4")
@_options.mtp
@_options.keep_unfit
@_options.tp
@_options.unsupported
@_options.calibration
@_options.device
@_options.run_options
@click.pass_context
def command(ctx: click.Context, /, src: Path | str, out: Path, **options: Any) -> None:
    """Quantize to int4, for vLLM and transformers, or for FastDeploy.

    Without --experts-only, shared experts, attention and dense FFN linears are quantized too. Router, norms,
    embeddings, head, vision tower and resampler never are. For FastDeploy experts are WINT4 and every other linear
    WINT8, per channel, and the MTP block goes to a folder of its own, OUT/mtp.

    \b
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --experts-only
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --activations fp8
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --runtime fastdeploy
    """
    _execute.drop_unfit(ctx, "wint4", options)
    _execute.built_in("wint4", src, out, settings=_options.settings("wint4", options), **options)
