"""The one way from the words of a command to a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from ernie_quant.cli import _shares
from ernie_quant.cli._progress import layers_bar, progress_bar
from ernie_quant.cli._show import show_plan, show_result

from ernie_quant.devices import CPU, found
from ernie_quant.needs import require

if TYPE_CHECKING:
    from ernie_quant.planning.calibration import Asked
    from ernie_quant.planning.recipe import Recipe
    from ernie_quant.planning.steps import Plan

CONTAINER_ONLY = ("unsupported", "tp")


def built_in(
    name: str, src: Path | str, out: Path, *, runtime: str = "", settings: dict[str, Any] | None = None, **options: Any
) -> None:  # fmt: skip
    """A short command: a built-in recipe, with what is given of its options in `settings`."""
    from ernie_quant.planning.built_in import make

    made = make(name, runtime, **(settings or {}))
    execute(src, out, made.recipe, made.runtime, **options)


def drop_unfit(ctx: click.Context, recipe: str, options: dict[str, Any]) -> None:
    """Takes from `options` those that the runtime has no use for.

    Raises UsageError for one of them that was given, PlanError for --experts-only of a container.
    """
    from ernie_quant import runtimes
    from ernie_quant.errors import PlanError
    from ernie_quant.planning.built_in import KINDS
    from ernie_quant.planning.built_in import options as takes_of

    runtime = options["runtime"]
    container = runtimes.find(runtime).PER_RANK
    takes = {*takes_of(recipe, runtime), *(CONTAINER_ONLY if container else ())}
    for name in dict.fromkeys((*(name for form in KINDS[recipe].forms.values() for name in form.options), *CONTAINER_ONLY)):
        if name in takes:
            continue
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            if container and name == "experts_only":  # which has a reason
                raise PlanError("--experts-only: FastDeploy's container needs its other linears as WINT8; leave it out", [])
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --runtime {runtime}")
        del options[name]


def execute(
    src: Path | str, out: Path, rules: Recipe, runtime: str, *, max_shard_size: int, vl_config: str, copy: tuple[str, ...],
    copy_code: bool, fixes: tuple[str, ...], follow_links: bool = False, unsupported: bool = False, dequantize: bool = False,
    tp: int = 1, calibration: tuple[str, ...] = (), calibration_tokens: int | None = None, method: str | None = None,
    fit: bool | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """Plan, then run, then say what happened."""
    from ernie_quant.run.asked import plan_of, text_of
    from ernie_quant.sources import open_source

    asked = asked_for(rules, calibration, calibration_tokens, method, fit)
    if asked is not None:
        refuse_two_methods(rules, method)
    text = text_of(asked)
    plan = plan_of(
        open_source(src, links=follow_links), rules, runtime, text, vl_config=vl_config, fixes=frozenset(fixes), copy=copy,
        copy_code=copy_code, shard_bytes=max_shard_size, unsupported=unsupported, dequantize=dequantize,
    )  # fmt: skip
    run(plan, out, tp=tp, **options)


def asked_for(
    rules: Recipe, texts: tuple[str, ...], tokens: int | None, method: str | None, fit: bool | None
) -> Asked | None:  # fmt: skip
    """The [calibration] of a recipe with what the options say instead of it; None where nobody asks for any."""
    from ernie_quant.planning.calibration import AUTO
    from ernie_quant.run.writing import asked_of

    if AUTO in texts and len(texts) > 1:
        raise click.UsageError(f"--calibration {AUTO} stands alone; with files of your own leave it out")
    given = {"tokens": tokens, "method": method, "fit": fit}
    said = {key: value for key, value in given.items() if value is not None}
    if texts or rules.calibration is not None:
        return asked_of(rules, texts or None, given)
    if said and said != {"fit": False}:
        option = {"tokens": "--calibration-tokens", "method": "--method", "fit": "--fit"}[next(iter(said))]
        does = {"tokens": "counts tokens of a text", "method": "makes codes of a text", "fit": "fits weights to text"}
        raise click.UsageError(f"{option} {does[next(iter(said))]}: name some with --calibration {AUTO} or --calibration FILE")
    return None


def refuse_two_methods(rules: Recipe, method: str | None) -> None:
    """The option, and another method in a rule: which one is meant?"""
    from ernie_quant.planning.recipe import own_method

    if other := next((rule for rule in rules.rules if method and own_method(rule.codec) not in ("", method)), None):
        rule = f"the recipe's rule for {other.describe()} says method = {own_method(other.codec)!r}"
        raise click.UsageError(f"--method {method}: {rule}; leave one out")


def run(
    plan: Plan, out: Path, *, dry_run: bool, restart: bool, workers: int | None, quiet: bool, as_json: bool, tp: int = 1,
    disk_budget: int | None = None, no_space_check: bool = False, ray: str | None = None, ray_gpus: int | None = None,
    shard_index: int | None = None, num_shards: int | None = None, merge: bool = False, device: str = CPU,
) -> None:  # fmt: skip
    """Show a plan, or run it and say what happened."""
    from ernie_quant.planning.reshard import check_size
    from ernie_quant.planning.share import check_sharing
    from ernie_quant.result.room import unknown_space
    from ernie_quant.run.memory import suit
    from ernie_quant.run.shared import run_shared, shared_bytes
    from ernie_quant.run.whole import run_plan
    from ernie_quant.runners.ray import Cluster

    how: dict[str, Any]
    share = _shares.asked(shard_index, num_shards, restart=restart, ray=ray)
    if disk_budget is not None and plan.source.downloader is None:
        raise click.UsageError(f"--disk-budget is for a source on a hub; {plan.source.folder} is a folder, leave it out")
    if ray_gpus and ray is None:
        raise click.UsageError("--ray-gpus is for files that a Ray cluster writes; name it with --ray")
    if ray is not None and device != CPU:
        raise click.UsageError(f"--device {device} is one of this machine; for those of a Ray cluster say --ray-gpus 1")
    if tp > 1:
        check_size(plan, tp)
    if share is not None:
        check_sharing(plan, tp)
    if dry_run:
        show_plan(plan, as_json)
        return
    if merge:
        _shares.merge(plan, out, quiet, as_json)
        return
    require("torch", "numba", *(["ray"] if ray else []))
    found(device)

    if not no_space_check and (note := unknown_space(out)):
        click.echo(f"note: {note}; --no-space-check leaves this out", err=True)
    suit(plan)
    if share is not None:
        how = {"workers": workers or 0, "disk_budget": disk_budget, "space_check": not no_space_check, "device": device}
        _shares.run(plan, out, share, quiet, as_json, how)
        return
    with layers_bar(plan.calibration is not None, quiet) as watch, progress_bar(shared_bytes(plan, tp), quiet) as progress:
        how = {"workers": workers or 0, "restart": restart, "disk_budget": disk_budget}
        how |= {"progress": progress, "space_check": not no_space_check, "watch": watch, "each": progress.file}
        how |= {} if ray is None else {"runner": Cluster(ray, ray_gpus or 0)}
        how["device"] = device
        result = run_shared(plan, out, tp, **how) if tp > 1 else run_plan(plan, out, **how)
    show_result(result, out, quiet, as_json)
