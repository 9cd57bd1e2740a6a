"""`ernie-quant allocate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ernie_quant.cli import _execute, _options, _paths
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json

if TYPE_CHECKING:
    from ernie_quant.planning.budget import Gpus

RUNTIMES = {"vllm": "vllm", "fastdeploy": "fastdeploy", "llama.cpp": "llama_cpp"}


class SeveralGpus(_paths.ParamType):
    """`2 x 80GiB`."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Gpus:
        """How many, of which kind."""
        from ernie_quant.planning.budget import Gpus

        try:
            return Gpus.of(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@_options.source
@click.option("-o", "--out", "recipe", type=_options.FILE, required=True, metavar="RECIPE.toml", help="The recipe to write.")
@click.option("--size", type=_options.Size(), help="Largest size of the weight files.")
@click.option("--bits", type=click.FloatRange(1, 16), help="Or: most bits per weight, over all tensors.")
@click.option("--gpus", type=SeveralGpus(), metavar="'N x SIZE|NAME'", help="Or: GPUs that shall hold it, '2 x 80GiB'.")
@click.option("--max-model-len", type=click.IntRange(1, 1 << 22), default=32768, show_default=True,
              help="With --gpus: tokens of a sequence that they have room for.")  # fmt: skip
@click.option("--runtime", type=click.Choice([*RUNTIMES, "llama_cpp"]), default="vllm", show_default=True,
              help="Program that shall load the result.")  # fmt: skip
@_options.calibration
@_options.texts
@click.option("--tokens", type=click.IntRange(256, 1 << 20), default=2048, show_default=True,
              help="Tokens of the text to measure with; --calibration-tokens with --calibration.")  # fmt: skip
@click.option("--sensitivity", "kept", type=_options.FILE, metavar="FILE",
              help="Keep what was measured, or begin with what is kept: another size then takes seconds.")  # fmt: skip
@click.option("--page", type=_options.FILE, metavar="FILE.html", help="Write a page with the curve of KL over bytes.")
@click.option("--achieved", multiple=True, type=_options.FILE, metavar="EVAL.json",
              help="With --page: show results too that `eval --save` has judged.")  # fmt: skip
@_options.quiet
@_options.json_option
def command(
    src: Path | str, recipe: Path, size: int | None, bits: float | None, gpus: Gpus | None, max_model_len: int, runtime: str,
    calibration: tuple[str, ...], calibration_tokens: int | None, method: str | None, fit: bool | None, texts: tuple[str, ...],
    tokens: int, kept: Path | None, page: Path | None, achieved: tuple[Path, ...], quiet: bool, as_json: bool, follow_links: bool,
) -> None:  # fmt: skip
    """Choose a codec for every layer under a budget, by what each costs at the model's output.

    One pass over the weights measures what every codec does to the output of its layer, and what an error there costs in
    KL divergence at the end; the recipe is the best choice that fits. What a program can load decides among what: vLLM one
    form per layer (int4, int8 or kept), llama.cpp a type per tensor, FastDeploy a number of first layers in WINT4.

    \b
    ernie-quant allocate ERNIE-4.5-21B-A3B-PT -o recipe.toml --size 11GB --runtime llama.cpp
    ernie-quant quantize ERNIE-4.5-21B-A3B-PT out --recipe recipe.toml
    """
    from ernie_quant.planning.budget import Budget
    from ernie_quant.planning.command import full
    from ernie_quant.planning.gpus import Limits
    from ernie_quant.planning.recipe import KEEP_ALL
    from ernie_quant.reporting import allocation, curve_page
    from ernie_quant.run import allocate
    from ernie_quant.run.memory import return_freed_memory
    from ernie_quant.sources import open_source

    if sum(limit is not None for limit in (size, bits, gpus)) != 1:
        raise click.UsageError("say how large it may be, with one of --size, --bits and --gpus")
    if achieved and page is None:
        raise click.UsageError("--achieved is for a page; name it with --page")
    if page is not None and not page.parent.is_dir():
        raise click.UsageError(f"--page {page}: there is no folder {page.parent}")
    if calibration and texts != ("auto",):
        raise click.UsageError("--text says what is measured on where there is no --calibration; leave one out")
    asked = _execute.asked_for(KEEP_ALL, calibration, calibration_tokens, method, fit)
    text = _options.chosen_texts(texts) if asked is None else asked.text
    text = text if isinstance(text, str) else tuple(text)
    wish = allocate.Wish(
        RUNTIMES.get(runtime, runtime), Budget(size, bits, gpus, Limits(max_model_len=max_model_len)), text, tokens, asked
    )
    points = [curve_page.achieved_by(file) for file in achieved]
    return_freed_memory()
    source = open_source(src, links=follow_links)
    units = allocate.begin(source, wish, recipe)
    with progress_bar(allocate.work(source), quiet) as progress:
        found = allocate.sensitivity(source, units, wish, kept, progress)
    drawn = as_json or page is not None
    value = allocate.as_json(allocate.choose(source, units, found, wish, recipe, curve=drawn))
    if page is not None:
        curve_page.write(value, page, points)
    if as_json:
        print_json(value)
    else:
        click.echo(allocation.text(value, full(f"quantize --recipe {shlex.quote(str(recipe))}", str(src), "OUT")))
