"""Every decision and every check, from headers and config alone; the run that follows has nothing left to decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ernie_quant import jsonio, runtimes, writers
from ernie_quant.archs import _rope
from ernie_quant.archs._config import Facts
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs._rounded import Rounded
from ernie_quant.codecs.keep import Keep
from ernie_quant.dtypes import FLOATS, TORCH_NAMES
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.names import EMBED
from ernie_quant.paths import FILE
from ernie_quant.planning import as_stored, fitting
from ernie_quant.planning.calibration import Calibration
from ernie_quant.planning.capacity import gpus_needed, tp_sizes
from ernie_quant.planning.carried import carried
from ernie_quant.planning.choose import Choice, Choices, choose, folded_problems, linears_of, oriented
from ernie_quant.planning.code import modules_of, without_missing
from ernie_quant.planning.files import into_files
from ernie_quant.planning.held import Item, Model
from ernie_quant.planning.identity import identity, of_statistics
from ernie_quant.planning.recipe import KEEP_ALL, Recipe
from ernie_quant.planning.steps import SHARD_BYTES, Plan, Step
from ernie_quant.planning.taken import taken_over
from ernie_quant.planning.weighed import weighed
from ernie_quant.runtimes import About, Runtime
from ernie_quant.views.kinds import View
from ernie_quant.weights.claims import notes_of, refuse_quantized
from ernie_quant.weights.layouts import LAYOUTS, Layout
from ernie_quant.weights.plain import Resolved, resolve
from ernie_quant.weights.stored import resolve_quantized


def make_plan(
    source: Checkpoint,
    *,
    runtime: str,
    recipe: Recipe = KEEP_ALL,
    vl_config: str = "flat",
    fixes: frozenset[str] = frozenset(),
    copy_code: bool = False,
    copy: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    unsupported: bool = False,
    dequantize: bool = False,
    statistics: Mapping[str, Mapping[str, View]] | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide everything. `copy`: patterns of files to carry along, too.

    `statistics`: weight -> what is known of its inputs, for codecs that look at it. `calibration`: the text that quantized
    weights are fitted to when the plan is run.

    Raises PlanError with every problem found, or ConfigError.
    """
    target = runtimes.find(runtime)
    stored = recipe.as_stored and not dequantize and as_stored.moves(source, target)
    if not (dequantize or stored):
        refuse_quantized(source)
    table = resolve_quantized(source) if dequantize or stored else resolve(source, fixes)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    layout = LAYOUTS[target.LAYOUT]
    recipe = recipe.for_model(table.map)
    if problem := layout.problem(table.map.dims):
        raise PlanError(f"{source.folder}: {problem}", [])
    weights = layout.join(table.weights)
    narrow = dequantize and table.layout.text_only and not layout.text_only
    choices = choose(weights, recipe, target, narrow=narrow, as_stored=stored)
    linears = linears_of(choices.chosen, target)
    numel = [(choice.codec, choice.spec.numel) for choice in choices.chosen]
    about = About(source, table.config, table.map, recipe.name, numel)
    positions = _rope.notes(layout.name, table.config)
    refused = [*target.unsupported(linears), *(_unscaled(positions, choices) if not layout.out_first else [])]
    problems = [*choices.problems, *recipe.unused(weights), *target.problems(linears), *target.model_problems(about)]
    problems += [] if unsupported else refused
    problems += [] if calibration else fitting.unknown(choices.chosen, recipe.name, statistics or {})
    if problems:
        why = as_stored.REFUSED.format(program=target.PROGRAM, layout=layout.name) if stored else "cannot be done as asked"
        raise PlanError(f"{source.folder}: {why}", folded_problems(problems))
    of_layers = weighed(choices.chosen, target)
    steps = [
        replace(
            _step(choice, target, (statistics or {}).get(choice.weight.name, {})), weighed=of_layers.get(choice.weight.name, {})
        )
        for choice in choices.chosen
    ]
    along = carried(source, copy, copy_code, documents_only=writers.find(target.FORMAT).SELF_CONTAINED)
    config = _config(table, layout, vl_config, steps, modules_of(along.files))
    metadata, said = target.metadata(about)
    if (entry := target.quantization_config(linears)) is not None:
        assert not (misread := target.misread(entry, linears)), misread[0]  # it is derived from what will be written
        config |= {**target.CONFIG, "quantization_config": entry}
    model = Model.of(table.config, table.map.dims)
    options = {
        "vl_config": vl_config, "fixes": fixes, "copy_code": copy_code, "max_shard_bytes": shard_bytes,
        "dequantize": dequantize, **({"as_stored": True} if stored else {}), **({"copy": sorted({*copy})} if copy else {}),
        **({"statistics": of_statistics(statistics)} if statistics else {}),
        **({"calibration": calibration.as_dict()} if calibration else {}),
        **({"kept": rounded} if (rounded := _rounded(steps)) else {}),
    }  # fmt: skip
    items = [Item(step.name, step.role, step.nbytes) for step in steps]
    shards = into_files(steps, target, shard_bytes, target.stem(about))
    if writers.find(target.FORMAT).SELF_CONTAINED:
        config |= {FILE: shards[0].filename}
    plan = Plan(
        source, runtime, layout, recipe, shards, table.map.dims, config, along.files, tp_sizes(target, linears, model),
        (
            *notes_of(source), *table.notes, *positions, *layout.left_out(table.weights), *along.notes, *choices.notes, *refused,
            *target.notes(linears), *said, *([as_stored.NOTE] if stored else []),
        ),
        identity(source, runtime, recipe, options), shard_bytes, gpus_needed(items, target, linears, model),
        calibration=calibration, metadata=metadata,
    )  # fmt: skip
    return fitting.judged(plan) if calibration else plan


def _rounded(steps: Sequence[Step]) -> str:
    """How kept weights are stored that have another dtype than the source's."""
    return "; ".join(sorted({step.codec.describe() for step in steps if isinstance(step.codec, Rounded)}))


def _unscaled(positions: Sequence[str], choices: Choices) -> list[str]:
    """Prequantized Paddle files are for FastDeploy alone, which would run another model without a word."""
    if all(isinstance(choice.codec, Keep) for choice in choices.chosen):
        return []
    return [f"{note}, and would compute something else; --unsupported writes it all the same" for note in positions]


def _step(choice: Choice, target: Runtime, statistics: Mapping[str, View]) -> Step:
    weight, codec, spec = choice.weight, choice.codec, choice.spec
    view = oriented(weight, codec, LAYOUTS[target.LAYOUT])
    sources = {piece.stored.target.ROWS for piece in taken_over(view, codec)}
    multiple = math.lcm(codec.rows, 1 if isinstance(codec, Keep) else target.ROWS, *sources)
    parts = target.parts(weight.name, codec, spec)
    stacked = any(part.index is not None for part in parts.values())
    group = target.layer_of(weight.name, weight.role) if stacked else ""
    return Step(weight.name, weight.role, view, spec, codec, parts, weight.sources, multiple, group, statistics, weight.row)


def _config(table: Resolved, layout: Layout, vl_config: str, steps: Sequence[Step], modules: set[str]) -> dict[str, Any]:
    if layout.text_only:  # its files say it in their own words
        return dict(jsonio.finite_only(table.config))
    dtype = next(s.codec.specs(s.spec)["weight"].dtype for s in steps if s.role == EMBED)  # never quantized
    if dtype not in FLOATS:
        raise ConfigError(f"the embeddings are {dtype}, not one of {', '.join(FLOATS)}")
    dims = table.map.dims
    shared = dims.get("MS", 0) // dims["M"] if "M" in dims else 0
    facts = Facts(TORCH_NAMES[dtype], shared, len(table.map.ids.get("mtp", ())))
    spelling = "transformers" if vl_config == "transformers" and layout.out_first else layout.name
    config: dict[str, Any] = table.arch.config_for(spelling, table.config, facts)
    return dict(jsonio.finite_only(without_missing(config, modules)))
