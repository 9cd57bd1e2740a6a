"""`ernie-quant merge`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _group, _options
from ernie_quant.cli._show import show_complete


@click.command()
@_options.out
@click.option("--source", type=_options.Source(), metavar="SRC",
              help="The source, if it lies somewhere else than for the shares.")  # fmt: skip
@_options.quiet
@_options.json_option
def command(out: Path, source: Path | str | None, quiet: bool, as_json: bool) -> None:
    """Complete a folder that was written in shares, with --shard-index and --num-shards.

    Reads the files back, and writes what a single run would: index, config.json, tokenizer, report, card and manifest, the
    same bytes. Refuses while a file is missing, and says which share writes it.

    \b
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --shard-index 0 --num-shards 2
    ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle out --shard-index 1 --num-shards 2
    ernie-quant merge out
    """
    from ernie_quant.errors import OutputError
    from ernie_quant.paths import MANIFEST, STATE
    from ernie_quant.result.shares import REQUEST, request_of

    if (out / MANIFEST).is_file() and not (out / STATE / REQUEST).is_file():
        show_complete(out, as_json)
        return
    request = request_of(out)
    maker = _maker(request.get("command"))
    src, words = source or request.get("source"), request.get("options")
    if maker is None or not isinstance(src, str | Path) or not isinstance(words, list):
        raise OutputError(f"{out / STATE / REQUEST}: does not say what the shares were asked for")
    if source is None and "://" not in str(src) and not Path(src).exists():
        raise OutputError(f"{src}: the source of {out} is not there; merge needs its small files: merge {out} --source SRC")
    how = [*(["--quiet"] if quiet else []), *(["--json"] if as_json else [])]
    line = [str(src), str(out), *map(str, words), *how, "--merge"]
    maker.main(line, prog_name=f"ernie-quant {request['command']}", standalone_mode=False)


def _maker(name: Any) -> click.Command | None:
    """The command that wrote the shares."""
    if name not in _group.COMMANDS:
        return None
    found: click.Command = importlib.import_module(f"ernie_quant.cli.{name}").command
    return found if any(option.name == "merge" for option in found.params) else None
