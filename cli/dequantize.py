"""`ernie-quant dequantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options


@click.command()
@_options.source
@_options.out
@_options.to_layout
@_options.run_options
def command(src: Path | str, out: Path, layout: str, **options: Any) -> None:
    """Turn a quantized checkpoint back into a plain bf16 one, with the weights that its runtime computes with.

    Reads every format that this tool writes, and FastDeploy's published WINT2 files. This is how a 2-bit model is
    looked at in a runtime that does not know the format.

    \b
    ernie-quant dequantize ERNIE-4.5-300B-A47B-2Bits-Paddle out --to pt
    """
    _execute.built_in(layout, src, out, dequantize=True, **options)
