"""`ernie-quant plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._show import print_json


@click.command()
@_options.source
@click.option("--recipe", "recipe_file", type=_options.TOML, help="Add a row for this recipe (TOML).")
@click.option("--gpu-memory", type=_options.Size(), default="80GiB", show_default=True, help="Memory of one GPU.")
@click.option("--utilization", type=click.FloatRange(0.1, 1), default=0.9, show_default=True, help="Share of it that is used.")
@click.option("--reserve", type=_options.Size(), default="3GiB", show_default=True, help="Of that, for activations and the like.")
@click.option("--max-model-len", type=click.IntRange(1, 1 << 22), default=32768, show_default=True, help="Tokens per sequence.")
@click.option(
    "--max-num-seqs", type=click.IntRange(1, 1 << 16), default=32, show_default=True, help="Sequences at once, at most."
)
@click.option(
    "--kv-dtype", type=click.Choice(["bf16", "fp8", "int8", "int4"]), default="bf16", show_default=True, help="KV cache."
)
@_options.wint4_layers("As in wint2.")
@_options.json_option
def command(
    src: Path | str, recipe_file: Path | None, gpu_memory: int, utilization: float, reserve: int, max_model_len: int,
    max_num_seqs: int, kv_dtype: str, wint4_layers: int, as_json: bool, follow_links: bool,
) -> None:  # fmt: skip
    """Show how many GPUs a checkpoint takes in each format. Reads headers only; the MTP block is not counted.

    \b
    ernie-quant plan ERNIE-4.5-300B-A47B-Paddle --gpu-memory 141GB
    """
    from ernie_quant.plan import capacity, recipe
    from ernie_quant.report import tables
    from ernie_quant.sources import open_source
    from ernie_quant.weights.claims import notes_of

    limits = capacity.Limits(gpu_memory, utilization, reserve, max_model_len, max_num_seqs, kv_dtype)
    own = recipe.read(recipe_file) if recipe_file else None
    checkpoint = open_source(src, links=follow_links)
    rows, notes = capacity.estimate(checkpoint, limits, wint4_layers, own), notes_of(checkpoint)
    if as_json:
        print_json({"rule": asdict(limits), "formats": [asdict(row) for row in rows], "notes": notes})
        return
    lines = [
        (
            row.format, row.runtimes, f"{row.weight_bytes / 2**30:.1f}", " ".join(map(str, row.tp_sizes)) or "-",
            str(row.gpus or "-"), f"{row.weight_bytes_per_gpu / 2**30:.1f}" if row.gpus else "-", str(row.sequences),
        )
        for row in rows
    ]  # fmt: skip
    head = ("format", "runtimes", "weights GiB", "TP sizes", "GPUs", "GiB per GPU", "sequences")
    click.echo(tables.table(head, lines))
    click.echo(
        f"\nusable per GPU: {utilization} x {gpu_memory / 2**30:.1f} GiB - {reserve / 2**30:.1f} GiB ="
        f" {limits.usable / 2**30:.1f} GiB, for the weights and at least one sequence of {max_model_len} tokens;"
        f"\nKV cache ({kv_dtype}): {rows[0].kv_bytes_per_token} bytes per token; sequences: of that length,"
        f" at most {max_num_seqs}"
    )
    for note in notes:
        click.echo(f"note: {note}")
