"""`ernie-quant eval`."""

from __future__ import annotations

from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json


@click.command()
@click.argument("out", type=_options.Source())
@click.option("--against", type=_options.Source(), help="The source; without it, there is perplexity alone.")
@_options.follow_links
@click.option("--text", "texts", multiple=True, required=True, type=_options.FILE, metavar="FILE",
              help="UTF-8 text, or .jsonl of texts or messages; several have a row each.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), default=3066, show_default=True,
              help="Predicted tokens of each text, a multiple of 511.")  # fmt: skip
@click.option("--weights-only", is_flag=True, help="Leave out int8 activations and KV cache (W4A8C8).")
@click.option("--save", type=_options.FILE, metavar="FILE", help="Keep the JSON result, for publish --eval.")
@_options.quiet
@_options.json_option
def command(
    out: Path | str, against: Path | str | None, follow_links: bool, texts: tuple[Path, ...], tokens: int, weights_only: bool,
    save: Path | None, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Evaluate a checkpoint on texts: perplexity, and with --against KL divergence from its source.

    The first tokens of each text are read in separate windows of 512, each predicting 511. Both models are passed layer
    by layer in float32, one expert at a time, in whatever form they are stored; the tokenizer is that of the source, or
    of OUT where the source has none. KL is that of (source || OUT), in nats per token. Of a W4A8C8 result the int8
    activations and the int8 KV cache are simulated.

    \b
    ernie-quant eval out --against ERNIE-4.5-21B-A3B-Paddle --text handbook.txt
    """
    from ernie_quant.calibration import evaluate

    from ernie_quant.disk import write_file
    from ernie_quant.jsonio import dumps
    from ernie_quant.reporting import evaluation

    if save is not None and not save.parent.is_dir():
        raise click.UsageError(f"--save {save}: there is no folder {save.parent}")
    from ernie_quant.run.memory import return_freed_memory

    return_freed_memory()
    two = evaluate.pair(out, against, links=follow_links, rounds=not weights_only)
    with progress_bar(two.nbytes, quiet) as progress:
        found = evaluate.evaluate(two, texts, tokens, progress)
    value = evaluate.as_json(found)
    if save is not None:
        write_file(save, dumps(value).encode())
    if as_json:
        print_json(value)
    else:
        click.echo(evaluation.text(value))
