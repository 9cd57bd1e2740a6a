"""`ernie-quant wint8`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options


@click.command()
@_options.source
@_options.out
@_options.experts_only
@_options.group_size
@_options.scale
@_options.runtime("wint8")
@_options.mtp
@_options.keep_unfit
@_options.calibration
@_options.device
@_options.run_options
def command(src: Path | str, out: Path, **options: Any) -> None:
    """Quantize to int8, for vLLM and transformers.

    Without --experts-only, shared experts, attention and dense FFN linears are quantized too. Router, norms,
    embeddings, head, vision tower and resampler never are.

    \b
    ernie-quant wint8 ERNIE-4.5-21B-A3B-Paddle out --experts-only
    """
    _execute.built_in("wint8", src, out, settings=_options.settings("wint8", options), **options)
