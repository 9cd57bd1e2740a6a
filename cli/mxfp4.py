"""`ernie-quant mxfp4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options


@click.command()
@_options.source
@_options.out
@_options.experts_only
@_options.runtime("mxfp4")
@_options.mtp
@_options.keep_unfit
@_options.device
@_options.run_options
def command(src: Path | str, out: Path, **options: Any) -> None:
    """Quantize to float4 in groups of 32 with powers of two as scales (MXFP4), for vLLM and transformers.

    For the float4 tensor cores of Blackwell, on which vLLM rounds the experts' inputs to float4 too. Other GPUs decode the
    weights and gain nothing: at the same 4.25 bits `wint4 --group-size 64` has a third less error.

    Without --experts-only, shared experts, attention and dense FFN linears are quantized too. Router, norms,
    embeddings, head, vision tower and resampler never are.

    \b
    ernie-quant mxfp4 ERNIE-4.5-21B-A3B-Paddle out --experts-only
    """
    _execute.built_in("mxfp4", src, out, settings=_options.settings("mxfp4", options), **options)
