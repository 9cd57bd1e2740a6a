"""`ernie-quant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _execute, _options


@click.command()
@_options.source
@_options.out
@click.option("--recipe", "recipe_file", type=_options.TOML, required=True, help="TOML file of rules.")
@_options.runtime_of_rules
@_options.keep_unfit
@_options.tp
@_options.calibration
@_options.device
@_options.run_options
def command(src: Path | str, out: Path, recipe_file: Path, runtime: str | None, keep_unfit: bool, **options: Any) -> None:
    """Quantize by a recipe: [[rule]] tables with role or match, codec and its options; the first match wins.

    \b
    ernie-quant quantize ERNIE-4.5-21B-A3B-Paddle out --recipe recipe.toml
    """
    from ernie_quant.planning import built_in, recipe

    rules = recipe.read(recipe_file, keep_unfit=keep_unfit)
    _execute.execute(src, out, rules, runtime or rules.runtime or built_in.VLLM, **options)
