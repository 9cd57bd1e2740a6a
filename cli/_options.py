"""Options that several commands share, and the one way from a plan to a finished folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from ernie_quant.cli._progress import progress_bar
from ernie_quant.cli.main import print_json, return_freed_memory

from ernie_quant.sizes import parse_size

if TYPE_CHECKING:
    from ernie_quant.plan import Plan
    from ernie_quant.recipe import Recipe
    from ernie_quant.run import RunResult

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


class Source(click.ParamType):
    """A folder, or an address on a hub: `hf://org/name@revision`."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """An address stays text."""
        return value if isinstance(value, Path) or "://" in value else Path(value)


source = click.argument("src", type=Source())
out = click.argument("out", type=FOLDER)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON result on stdout.")
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress, no report on the terminal.")
fix = click.option(
    "--fix", "fixes", multiple=True, type=click.Choice(["mtp_linear_proj"]),
    help="Repair a tensor that is known to be stored wrongly: mtp_linear_proj, untransposed in a published file.",
)  # fmt: skip
experts_only = click.option("--experts-only", is_flag=True, help="Quantize the routed experts, keep everything else.")
mtp = click.option("--mtp", is_flag=True, help="Quantize the linears of the MTP block too.")
keep_unfit = click.option("--keep-unfit", is_flag=True, help="Keep tensors whose widths do not fit, instead of refusing.")
runtime = click.option(
    "--runtime", type=click.Choice(["vllm", "transformers"]), default="vllm", show_default=True,
    help="Program that shall load the result; the files of vllm load in transformers too.",
)  # fmt: skip


RUNTIMES = {"pt": "vllm", "paddle": "fastdeploy"}  # whose names and config.json a layout has
to_layout = click.option("--to", "layout", type=click.Choice(sorted(RUNTIMES)), required=True, help="Layout of the result.")


def write_options(command: F) -> F:
    """Options of every command that writes a folder."""
    for option in reversed(
        [
            click.option("--dry-run", is_flag=True, help="Show what would happen to each group of tensors; write nothing."),
            click.option("--restart", is_flag=True, help="Drop what an earlier run left in OUT and begin anew."),
            click.option("--workers", type=click.IntRange(1, 64), help="Threads.  [default: one per processor, at most 8]"),
            click.option("--disk-budget", type=Size(), help="Bytes of a hub's files on disk at a time.  [default: the least]"),
            click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file."),
            quiet, json_option,
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def run_options(command: F) -> F:
    """The same, and those of commands that read an unquantized checkpoint."""
    for option in (
        fix,
        click.option("--copy-code", is_flag=True, help="Carry Python files of the source along; they are never run."),
        click.option("--vl-config", type=click.Choice(["flat", "transformers"]), default="flat", show_default=True,
                     help="Spelling of config.json for VL models: flat is what vLLM and the -PT repositories use."),
    ):  # fmt: skip
        command = option(command)
    return write_options(command)


class Size(click.ParamType):
    """Bytes: `5GB`, `500MB`, `2GiB` or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse."""
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def execute(
    src: Path | str, out: Path, rules: Recipe, runtime: str, *, max_shard_size: int, vl_config: str, copy_code: bool,
    fixes: tuple[str, ...], unsupported: bool = False, dequantize: bool = False, tp: int = 1, **options: Any,
) -> None:  # fmt: skip
    """Plan, then run, then say what happened."""
    from ernie_quant.checkpoint import Checkpoint
    from ernie_quant.plan import make_plan

    plan = make_plan(
        Checkpoint.open(src), runtime=runtime, recipe=rules, vl_config=vl_config, fixes=frozenset(fixes),
        copy_code=copy_code, shard_bytes=max_shard_size, unsupported=unsupported, dequantize=dequantize,
    )  # fmt: skip
    run(plan, out, tp=tp, **options)


def run(
    plan: Plan, out: Path, *, dry_run: bool, restart: bool, workers: int | None, quiet: bool, as_json: bool, tp: int = 1,
    disk_budget: int | None = None,
) -> None:  # fmt: skip
    """Show a plan, or run it and say what happened."""
    from ernie_quant.reshard import check_size, run_shared
    from ernie_quant.run import run_plan

    if tp > 1:
        check_size(plan, tp)
    if dry_run:
        _show_plan(plan, as_json)
        return

    return_freed_memory()
    total = sum(step.spec.nbytes for step in plan.steps)
    with progress_bar(total, "bytes", quiet) as progress:
        how: dict[str, Any] = {"workers": workers or 0, "restart": restart, "disk_budget": disk_budget, "progress": progress}
        result = run_shared(plan, out, tp, **how) if tp > 1 else run_plan(plan, out, **how)
    _show_result(result, out, quiet, as_json)


def _facts(plan: Plan) -> dict[str, Any]:
    from ernie_quant.plan import bits_per_weight

    return {
        "bytes_in": plan.origin.nbytes,
        "bytes_out": plan.nbytes,
        "disk_bytes": plan.disk_bytes,
        "bits_per_weight": round(bits_per_weight(plan), 4),
        "files": len(plan.shards),
        "tp_sizes": list(plan.tp_sizes),
        "notes": list(plan.notes),
    }


def _show_plan(plan: Plan, as_json: bool) -> None:
    from ernie_quant.plan import summary
    from ernie_quant.report import table

    facts, groups = _facts(plan), summary(plan)
    if as_json:
        print_json({"status": "planned", **facts, "groups": groups})
        return
    lines = [
        (g["name"], g["codec"], str(g["tensors"]), f"{g['bytes_in'] / 1e9:.3f}", f"{g['bytes_out'] / 1e9:.3f}") for g in groups
    ]
    click.echo(table(("tensors", "codec", "count", "GB in", "GB out"), lines))
    click.echo(
        f"\n{facts['bytes_in'] / 1e9:.2f} GB -> {facts['bytes_out']} bytes ({facts['bytes_out'] / 1e9:.2f} GB) of tensors,"
        f" {facts['bits_per_weight']:.3f} bits per weight, in {facts['files']} file(s); disk needed: {facts['disk_bytes']} bytes"
    )
    _show_notes(plan)


def _show_notes(plan: Plan) -> None:
    if plan.tp_sizes:
        click.echo(f"tensor-parallel sizes that fit: {', '.join(map(str, plan.tp_sizes))}")
    for note in plan.notes:
        click.echo(f"note: {note}")


def _show_result(result: RunResult, out: Path, quiet: bool, as_json: bool) -> None:
    from ernie_quant.card import run_commands
    from ernie_quant.report import tables, total

    plan, reports, complete = result.plan, result.reports, result.complete_before
    if as_json:
        changed = total([r for r in reports if r.codec != "kept"])
        errors = {"rel_error": changed.rel_error, "worst_rel_error": changed.worst, "quantized": changed.tensors}
        errors["files_before"] = result.files_before
        print_json(
            {"status": "complete" if complete else "done", "out": str(out), **_facts(plan), **({} if complete else errors)}
        )
        return
    if complete:
        click.echo(f"{out}: complete")
        return
    if not quiet:
        click.echo(tables(reports))
        _show_notes(plan)
        before = f" ({result.files_before} were finished before)" if result.files_before else ""
        click.echo(f"\n{out}: {plan.nbytes / 1e9:.3f} GB in {len(plan.shards)} file(s){before}. To run it:")
        for title, command in run_commands(plan, out):
            click.echo(f"  {title}: {command}")


GROUP_SIZES = ("128", "64", "32", "channel")
group_size = click.option(
    "--group-size", type=click.Choice(GROUP_SIZES), default="128", show_default=True, help="Inputs that share a scale."
)
scale = click.option(
    "--scale", type=click.Choice(["mse", "absmax"]), default="mse", show_default=True,
    help="Choose scales by squared error, or by the largest weight.",
)  # fmt: skip


unsupported = click.option(
    "--unsupported", is_flag=True, help="Write a checkpoint that no program loads (FastDeploy, VL) all the same."
)


def quantize_container(
    name: str,
    wint4_layers: int | None,
    src: Path | str,
    out: Path,
    *,
    experts_only: bool,
    scale: str,
    effort: int,
    **options: Any,
) -> None:
    """`wint2`, and `wint4` for FastDeploy."""
    from ernie_quant import recipe
    from ernie_quant.errors import PlanError

    if experts_only:
        raise PlanError("--experts-only: FastDeploy's container needs its other linears as WINT8; leave it out", [])
    rules = recipe.container(name, wint4_layers, scale=scale, effort=effort)
    execute(src, out, rules, "fastdeploy", **options)


def quantize_integers(bits: int, src: Path | str, out: Path, *, group_size: str, scale: str, **options: Any) -> None:
    """`wint4` and `wint8` for vLLM and transformers."""
    group = int(group_size) if group_size.isdigit() else group_size
    built_in(f"wint{bits}", "rtn", {"bits": bits, "group_size": group, "scale": scale}, src, out, **options)


def built_in(
    name: str, codec: str, settings: dict[str, Any], src: Path | str, out: Path, *, experts_only: bool, mtp: bool,
    keep_unfit: bool, runtime: str, **options: Any,
) -> None:  # fmt: skip
    """A short command: one codec, and what it is for."""
    from ernie_quant import codecs, recipe

    rules = recipe.built_in(
        name, codecs.make(codec, settings), experts_only=experts_only, mtp=mtp, keep_unfit=keep_unfit
    )  # fmt: skip
    execute(src, out, rules, runtime, **options)
