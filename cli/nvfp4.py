"""`ernie-quant nvfp4`."""

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
@click.option(
    "--activations", type=click.Choice(packed.FLOAT4_ACTIVATIONS), default=packed.FLOAT4_ACTIVATIONS[0], show_default=True,
    help="Inputs of the weights: as they are, or float4 too, for Blackwell (W4A4; with --calibration).",
)  # fmt: skip
@_options.runtime("nvfp4", "; transformers needs `import ernie_quant.transformers`")
@_options.mtp
@_options.keep_unfit
@_options.calibration
@_options.device
@_options.run_options
def command(src: Path | str, out: Path, **options: Any) -> None:
    """Quantize to float4 in groups of 16 with float8 scales (NVFP4), for vLLM.

    With --activations fp4 vLLM computes on the float4 tensor cores of Blackwell; scales of the inputs are measured on
    text, which --calibration must name. Without, weights are decoded on every GPU, and nothing is gained: the error is
    that of `wint4 --group-size 32`, which has as many bits (4.5), runs as fast there and loads in transformers by itself.

    Without --experts-only, shared experts, attention and dense FFN linears are quantized too. Router, norms,
    embeddings, head, vision tower and resampler never are.

    \b
    ernie-quant nvfp4 ERNIE-4.5-21B-A3B-Paddle out --activations fp4 --calibration auto
    ernie-quant nvfp4 ERNIE-4.5-21B-A3B-Paddle out --experts-only
    """
    if options["activations"] == packed.FLOAT4_ACTIVATIONS[1] and not options["calibration"]:
        raise click.UsageError(
            "--activations fp4 wants --calibration auto or --calibration FILE: scales of inputs are measured on text"
        )
    _execute.built_in("nvfp4", src, out, settings=_options.settings("nvfp4", options), **options)
