"""`ernie-quant calibrate`."""

from __future__ import annotations

from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json


@click.command()
@_options.source
@click.argument("stats", type=_options.FILE)
@_options.texts
@click.option("--tokens", type=click.IntRange(1), default=32768, show_default=True, help="Tokens of it, in windows of 512.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of documents.")
@click.option("--matrices", is_flag=True, help="Second moments between channels too, of what q, k and v, o_proj and experts see.")
@click.option("--all-experts", is_flag=True, help="Statistics of every expert over all tokens, routed to it or not.")
@_options.quiet
@_options.json_option
def command(
    src: Path | str, stats: Path, texts: tuple[str, ...], tokens: int, seed: int, matrices: bool, all_experts: bool,
    quiet: bool, as_json: bool, follow_links: bool,
) -> None:  # fmt: skip
    """Collect statistics of what goes into the projections of a model while it reads a text.

    One pass in float32, one expert in memory at a time. STATS is a safetensors file: per layer and projection the mean
    square and the largest value of each input channel, tokens per expert, largest k and v per channel. Experts that saw
    no token, or few, are named.

    \b
    ernie-quant calibrate ERNIE-4.5-21B-A3B-Paddle stats.safetensors --text auto --tokens 65536
    """
    from ernie_quant.calibration import collect

    chosen = _options.chosen_texts(texts)
    from ernie_quant.run.memory import return_freed_memory

    return_freed_memory()
    source = collect.prepare(src, stats, links=follow_links)
    with progress_bar(collect.work(source), quiet) as progress:
        found = collect.collect(
            source, stats, chosen, tokens, seed=seed, matrices=matrices, all_experts=all_experts, progress=progress
        )
    if as_json:
        print_json(collect.as_json(found))
    else:
        click.echo(collect.as_text(found))
