"""`ernie-quant inspect`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from ernie_quant.cli import _options, _show
from ernie_quant.cli._show import print_json


@click.command()
@_options.source
@_options.fix
@_options.json_option
def command(src: Path | str, fixes: tuple[str, ...], as_json: bool, follow_links: bool) -> None:
    """Show what a checkpoint is, where its bytes are, and what is wrong with it.

    Reads headers and config.json only. Exits with 1 if there is any anomaly.

    \b
    ernie-quant inspect ERNIE-4.5-21B-A3B-Paddle
    """
    from ernie_quant import inspection

    inspected = inspection.inspect(src, frozenset(fixes), links=follow_links)
    if as_json:
        print_json(dict(inspected.__dict__))
    else:
        click.echo(_show.inspection(inspected))
    sys.exit(1 if inspected.anomalies else 0)
