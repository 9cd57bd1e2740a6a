"""`ernie-quant report`."""

from __future__ import annotations

from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._show import print_json


@click.command()
@_options.out
@click.option("--out", "target", type=_options.FILE, help="Write the page here.  [default: report.html in OUT]")
@click.option("--plots", is_flag=True, help="Write the main pictures as PNG too, in a folder plots/ beside the page.")
@_options.quiet
@_options.json_option
def command(out: Path, target: Path | None, plots: bool, quiet: bool, as_json: bool) -> None:
    """Write one page about a result: where its bytes are, and the error of every tensor.

    The page is a single file that opens in any browser and asks no network. --plots needs matplotlib.

    \b
    ernie-quant report out
    ernie-quant report out --out report.html --plots
    """
    from ernie_quant.report import page, rows, saved

    saved_report = saved.read(out)
    written = [page.write(saved_report, target or out / rows.PAGE)]
    if plots:
        from ernie_quant.report.plots import write_plots

        written += write_plots(saved_report, written[0].path.parent / rows.PLOTS_FOLDER)
    if as_json:
        print_json({"status": "done", "files": {str(file.path): file.bytes for file in written}})
    elif not quiet:
        for file in written:
            click.echo(f"{file.path}: {file.bytes / 1e6:.2f} MB")
