"""`ernie-quant wint4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from ernie_quant.cli import _options

CONTAINER_ONLY = ("unsupported", "tp")
PT_ONLY = ("group_size", "mtp", "keep_unfit")


@click.command()
@_options.source
@_options.out
@_options.experts_only
@_options.group_size
@_options.scale
@click.option(
    "--runtime", type=click.Choice(["vllm", "transformers", "fastdeploy"]), default="vllm", show_default=True,
    help="Program that shall load the result; the files of vllm load in transformers too.",
)  # fmt: skip
@_options.mtp
@_options.keep_unfit
@click.option("--tp", type=click.IntRange(1, 16), default=1, show_default=True, help="Ranks to write, for FastDeploy.")
@_options.unsupported
@_options.run_options
@click.pass_context
def command(ctx: click.Context, src: Path | str, out: Path, runtime: str, **options: Any) -> None:
    """Quantize to int4, for vLLM and transformers, or for FastDeploy.

    Without --experts-only, shared experts, attention and dense FFN linears are quantized too. Router, norms,
    embeddings, head, vision tower and resampler never are. For FastDeploy experts are WINT4 and every other linear
    WINT8, per channel, and the MTP block goes to a folder of its own, OUT/mtp.

    \b
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --experts-only
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --runtime fastdeploy
    """
    foreign = PT_ONLY if runtime == "fastdeploy" else CONTAINER_ONLY
    given = [name for name in foreign if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} does not go with --runtime {runtime}")
    for name in foreign:
        del options[name]
    if runtime == "fastdeploy":
        _options.quantize_container("wint4", None, src, out, effort=16, **options)
    else:
        _options.quantize_integers(4, src, out, runtime=runtime, **options)
