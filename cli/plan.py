"""`ernie-quant plan`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ernie_quant.cli import _options, _paths, _plan_table
from ernie_quant.cli._show import print_json

from ernie_quant.planning import gpus

if TYPE_CHECKING:
    from ernie_quant.planning.capacity import Estimate
    from ernie_quant.planning.gpus import Gpu, Limits


class Gpus(_paths.ParamType):
    """GPUs, by memory or by name, separated by commas."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Gpu, ...]:
        """All of them."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(gpus.find(text.strip()) for text in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@_options.source
@click.option("--recipe", "recipe_file", type=_options.TOML, help="Add a row for this recipe (TOML).")
@click.option("--gpu-memory", "kinds", type=Gpus(), default=gpus.USUAL, show_default=True, metavar="SIZE|NAME[,…]",
              help="GPUs: memory (48GiB, or 48), or names (H100, RTX4090, MI300X); several for a table.")  # fmt: skip
@click.option("--gpus", "count", type=click.IntRange(1, 64), help="What so many GPUs have room for: context, sequences.")
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
    src: Path | str, recipe_file: Path | None, kinds: tuple[Gpu, ...], count: int | None, utilization: float, reserve: int,
    max_model_len: int, max_num_seqs: int, kv_dtype: str, wint4_layers: int, as_json: bool, follow_links: bool,
) -> None:  # fmt: skip
    """Show what can be made of a checkpoint, and how many GPUs each form takes.

    Reads headers only; the MTP block is not counted. A quantized checkpoint, of ernie-quant or another, is planned as it
    is. With --gpus the question is the other way round: the longest context, and how many sequences.

    \b
    ernie-quant plan ERNIE-4.5-300B-A47B-Paddle --gpu-memory 24,48,80,141
    ernie-quant plan ERNIE-4.5-300B-A47B-Paddle --gpu-memory H200 --gpus 2
    """
    from ernie_quant.planning import capacity, recipe
    from ernie_quant.sources import open_source
    from ernie_quant.weights.claims import notes_of

    if count is not None and len(kinds) > 1:
        raise click.UsageError("--gpus N asks about one kind of GPU; --gpu-memory names several")
    limits = gpus.Limits(utilization, reserve, max_model_len, max_num_seqs, kv_dtype)
    own = recipe.read(recipe_file) if recipe_file else None
    checkpoint = open_source(src, links=follow_links)
    question = capacity.Question(limits, kinds, count)
    found = capacity.estimate(checkpoint, question, wint4_layers=wint4_layers, recipe=own)
    notes = notes_of(checkpoint)
    if as_json:
        print_json(_as_json(found, limits, kinds, count, notes))
        return
    click.echo("\n".join(_plan_table.lines(found, limits, kinds, count, _cores())))
    for note in notes:
        click.echo(f"note: {note}")


def _as_json(found: Estimate, limits: Limits, kinds: tuple[Gpu, ...], count: int | None, notes: list[str]) -> dict[str, Any]:
    return {
        "limits": asdict(limits),
        "gpus": [{**asdict(gpu), "usable": int(limits.usable(gpu))} for gpu in kinds],
        "count": count,
        "formats": [asdict(row) for row in found.rows],
        "refused": dict(found.refused),
        "notes": notes,
    }


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
