"""A command of which several processes write a share each: its options, what is kept of it for `merge`, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli._show import print_json, show_result

if TYPE_CHECKING:
    from ernie_quant.planning.share import Share
    from ernie_quant.planning.steps import Plan

# options that say how a result is made, and not which one it is
HOW = {
    "src", "out", "dry_run", "restart", "workers", "device", "disk_budget", "ray", "ray_gpus", "shard_index", "num_shards",
    "merge", "no_space_check", "quiet", "as_json",
}  # fmt: skip


def asked(index: int | None, number: int | None, *, restart: bool, ray: str | None) -> Share | None:
    """The share that the options name, if they do. Raises UsageError."""
    from ernie_quant.planning.share import Share

    if index is None and number is None:
        return None
    if index is None or number is None:
        raise click.UsageError("--shard-index I and --num-shards N go together")
    if index >= number:
        raise click.UsageError(f"--shard-index {index}: of --num-shards {number} there are 0 to {number - 1}")
    if restart:
        raise click.UsageError("--restart would drop what other shares have written; delete OUT, then start all shares")
    if ray is not None:
        raise click.UsageError("--ray writes all files itself; leave --shard-index and --num-shards out")
    return Share(index, number)


def run(plan: Plan, out: Path, share: Share, quiet: bool, as_json: bool, how: dict[str, Any]) -> None:
    """Write a share, and say what is left to do."""
    from ernie_quant.run.share import ShareResult, run_share

    with progress_bar(sum(shard.nbytes_in for shard in share.files(plan)), quiet) as progress:
        done = run_share(plan, out, share, _request(plan), progress=progress, each=progress.file, **how)
    if not isinstance(done, ShareResult):
        show_result(done, out, quiet, as_json)
    elif as_json:
        files = {"files": list(done.files), "files_before": done.files_before}
        print_json({"status": "share", "out": str(out), "shard_index": share.index, "num_shards": share.of, **files})
    elif not quiet:
        before = f" ({done.files_before} were finished before)" if done.files_before else ""
        click.echo(f"{out}: {share}: {len(done.files)} of {len(plan.shards)} file(s){before}. After the last share:")
        click.echo(f"  ernie-quant merge {out}")


def merge(plan: Plan, out: Path, quiet: bool, as_json: bool) -> None:
    """Complete the folder, and say what was made."""
    from ernie_quant.result.shares import request_of
    from ernie_quant.run.share import merge_shares

    of = request_of(out)["num_shards"]
    with progress_bar(plan.nbytes_in, quiet) as progress:
        done = merge_shares(plan, out, of, progress=progress)
    show_result(done, out, quiet, as_json)


def _request(plan: Plan) -> dict[str, Any]:
    """The command, with absolute paths, and of a hub the commit."""
    context = click.get_current_context()
    source = plan.origin
    src = f"{source.address}@{source.revision}" if source.address else str(context.params["src"].resolve())
    return {"command": context.info_name, "source": src, "options": list(_words(context))}


def _words(context: click.Context) -> Iterator[str]:
    """The options that were typed and say what is made."""
    for option in context.command.params:
        name = option.name or ""
        if name in HOW or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        assert isinstance(option, click.Option)
        value = context.params[name]
        if option.is_flag:
            yield max(option.opts if value else option.secondary_opts, key=len)
            continue
        for one in value if option.multiple else [value]:
            yield max(option.opts, key=len)
            yield str(one.resolve() if isinstance(one, Path) else one)
