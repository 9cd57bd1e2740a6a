"""`ernie-quant publish`."""

from __future__ import annotations

from pathlib import Path

import click
from ernie_quant.cli import _options
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json


@click.command()
@_options.out
@click.argument("repo")
@click.option("--private/--public", default=None, help="Of a new repository.  [default: private]")
@click.option("--revision", default="", help="Branch; made if there is none.  [default: the hub's]")
@click.option("--pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--tag", default="", help="Name the commit so.")
@click.option("--eval", "evaluated", type=_options.FILE, metavar="FILE",
              help="What eval --save has kept of this result: a table in its card.")  # fmt: skip
@click.option("--name", default="", help="Of the model, in its card.  [default: the repository's]")
@click.option("--base-model", default="", metavar="ORG/NAME", help="The source, for a card of one that was a folder.")
@click.option("--delete-as-published", is_flag=True, help="Delete each weight file here as soon as it is uploaded.")
@click.option("--allow-odd-values", is_flag=True, help="Publish a result whose weights hold NaN or infinity, too.")
@_options.quiet
@_options.json_option
def command(
    out: Path, repo: str, private: bool | None, revision: str, pr: bool, tag: str, evaluated: Path | None,
    name: str, base_model: str, delete_as_published: bool, allow_odd_values: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Publish a finished result to a hub repository: ORG/NAME on Hugging Face, modelscope://ORG/NAME or aistudio://ORG/NAME.

    Files are uploaded one by one and committed together; what the hub then reports (names, sizes, hashes) must be what
    is here. An interrupted publish goes on with the same command. A new repository is private unless --public is given;
    the visibility of one that exists is never changed. A result whose report counts NaN or infinity in its weights is
    refused by name, unless --allow-odd-values is given. The token is that of `hf auth login` or HF_TOKEN.

    \b
    ernie-quant publish out my-org/ERNIE-4.5-21B-A3B-WINT4 --tag v1
    """
    from ernie_quant import hubs, publish

    scheme, _, repo = repo.rpartition("://")
    scheme = scheme or "hf"
    destination = publish.Destination(
        repo, revision, private, pr, tag, delete_as_published, allow_odd_values, scheme, name, base_model
    )
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0
    with progress_bar(size, quiet) as progress:
        result = publish.publish(out, hubs.publisher(scheme), destination, progress, evaluated)
    if as_json:
        print_json(publish.as_json(result))
        return
    done = f"{result.uploaded} files, {result.bytes_uploaded / 1e9:.2f} GB uploaded" if result.uploaded else "nothing to upload"
    click.echo(f"{result.repo}: {result.status}: {done}; commit {result.commit}{f', tag {result.tag}' if result.tag else ''}")
