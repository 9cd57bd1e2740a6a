"""`ernie-quant report`."""

from __future__ import annotations

from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._show import print_json


@click.command()
@_options.out
@click.option("--out", "target", type=_options.FILE,
              help="Write the page here.  [default: report.html in OUT, comparison.html with --against]")  # fmt: skip
@click.option("--against", type=_options.FOLDER, metavar="OTHER",
              help="Show OUT (A) and another result of the same model (B) side by side.")  # fmt: skip
@click.option("--csv", type=_options.FILE, metavar="FILE", help="Write a line of each tensor into FILE too.")
@click.option("--plots", is_flag=True, help="Write the main pictures as PNG too, in a folder plots/ beside the page.")
@_options.quiet
@_options.json_option
def command(
    out: Path, target: Path | None, against: Path | None, csv: Path | None, plots: bool, quiet: bool, as_json: bool
) -> None:  # fmt: skip
    """Write one page about a result: where its bytes are, and the error of every tensor.

    The page is a single file that opens in any browser and asks no network. Errors stand beside what the codec loses of
    Gaussian weights, and outliers are marked. --plots needs matplotlib.

    \b
    ernie-quant report out
    ernie-quant report out --out report.html --plots
    ernie-quant report out --csv tensors.csv
    ernie-quant report out --against another
    """
    from ernie_quant.reporting import page, rows, saved, spreadsheet

    if against and (csv or plots):
        raise click.UsageError("--csv and --plots are of one result, --against shows two")
    report, other = saved.read(out), saved.read(against) if against else None
    written = [page.write(report, target or out / (rows.COMPARISON if other else rows.PAGE), other)]
    if csv:
        written.append(spreadsheet.write(report, csv))
    if plots:
        from ernie_quant.reporting.plots import write_plots

        written += write_plots(report, written[0].path.parent / rows.PLOTS_FOLDER)
    if as_json:
        print_json({"status": "done", "files": {str(file.path): file.bytes for file in written}})
    elif not quiet:
        for file in written:
            click.echo(f"{file.path}: {file.bytes / 1e6:.2f} MB")
