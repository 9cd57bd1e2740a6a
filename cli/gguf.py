"""`ernie-quant gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options

from ernie_quant.planning import built_in


@click.command()
@_options.source
@_options.out
@click.option(
    "--type", type=click.Choice(built_in.GGUF_TYPES, case_sensitive=False),
    help=f"Type of the file; mixes give some tensors more bits, as llama.cpp's do.  [default: {built_in.GGUF_TYPE}]",
)  # fmt: skip
@click.option("--pure", is_flag=True, help="One type for every matrix.")
@_options.experts_only
@click.option("--keep-unfit", is_flag=True, help="Rows that a block does not divide get another type, as in llama.cpp.")
@click.option("--imatrix", type=_options.FILE, metavar="STATS",
              help="Weigh errors by the inputs that `calibrate SRC STATS` has seen.")  # fmt: skip
@_options.fix
@_options.device
@_options.single_file_options
def command(
    src: Path | str, out: Path, max_shard_size: int, copy: tuple[str, ...], copy_code: bool, fixes: tuple[str, ...],
    imatrix: Path | None, follow_links: bool, **options: Any,
) -> None:  # fmt: skip
    """Write a GGUF file for llama.cpp, Ollama and LM Studio.

    From Paddle or PT files, of models with and without experts. The MTP block is left out; of a VL model the text model is
    written, which sees no images. Of results of wint4 and wint8 the codes are taken over, as Q4_0 and Q8_0.

    \b
    ernie-quant gguf ERNIE-4.5-21B-A3B-Paddle out
    ernie-quant gguf ERNIE-4.5-21B-A3B-PT out --type Q8_0
    ernie-quant gguf ERNIE-4.5-21B-A3B-PT out --type Q2_K --imatrix stats.safetensors
    """
    from ernie_quant.planning.gguf import gguf_plan
    from ernie_quant.sources import open_source

    settings = {key: options.pop(key) for key in built_in.GGUF}
    plan = gguf_plan(
        open_source(src, links=follow_links), settings=settings, fixes=frozenset(fixes), copy=copy, copy_code=copy_code,
        shard_bytes=max_shard_size, imatrix=imatrix,
    )  # fmt: skip
    _execute.run(plan, out, **options)
