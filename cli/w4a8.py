"""`ernie-quant w4a8`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options

from ernie_quant.planning import built_in


@click.command()
@_options.source
@_options.out
@_options.runtime("w4a8")
@click.option(
    "--hadamard-block-size", type=click.Choice([str(n) for n in built_in.HADAMARDS]), default=str(built_in.HADAMARD),
    show_default=True, help="Inputs of down_proj that are rotated together; divides those of a rank.",
)  # fmt: skip
@_options.tp
@_options.scale
@_options.unsupported
@_options.calibration
@_options.device
@_options.run_options
def command(src: Path | str, out: Path, **options: Any) -> None:
    """Quantize the experts to int4 for inputs in int8, and the KV cache to int8, for FastDeploy (W4A8C8).

    Paddle layout: experts int4 with static scales of their int8 inputs, down_proj rotated by a Hadamard matrix; every other
    linear WINT8; scales of an int8 KV cache per channel. All these scales are measured on text: --calibration must name one.
    Text models only. The MTP block goes to a folder of its own, OUT/mtp, without a cache: FastDeploy does not draft with it.

    \b
    ernie-quant w4a8 ERNIE-4.5-21B-A3B-Paddle out --calibration auto
    ernie-quant w4a8 ERNIE-4.5-300B-A47B-Paddle out --calibration auto --tp 4
    """
    if not options["calibration"]:
        raise click.UsageError(
            "w4a8 wants --calibration auto or --calibration FILE: scales of inputs and cache are measured on text"
        )
    _execute.built_in("w4a8", src, out, settings=_options.settings("w4a8", options), **options)
