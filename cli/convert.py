"""`ernie-quant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options


@click.command()
@_options.source
@_options.out
@_options.to_layout
@_options.tp
@_options.unsupported
@_options.run_options
def command(src: Path | str, out: Path, layout: str, **options: Any) -> None:
    """Convert names, layouts and config.json between Paddle and PT; every weight keeps its bits.

    Quantized weights keep their codes and scales: FastDeploy's WINT2 and WINT4 checkpoints, published ones too and of any
    number of ranks, become files for vLLM and back. What FastDeploy has no form for is refused.

    \b
    ernie-quant convert ERNIE-4.5-21B-A3B-Paddle ERNIE-4.5-21B-A3B-PT --to pt
    ernie-quant convert ERNIE-4.5-300B-A47B-2Bits-Paddle out --to pt
    """
    _execute.built_in(layout, src, out, **options)
