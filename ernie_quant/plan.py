"""Every decision and every check, from headers and config alone; the run that follows has nothing left to decide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ernie_quant import names, recipe, runtimes, views
from ernie_quant.archs._config import Facts, whole
from ernie_quant.checkpoint import ITEMSIZE, Checkpoint, TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.identity import Identity, identity
from ernie_quant.lazy import View
from ernie_quant.names import EMBED, Weight
from ernie_quant.recipe import Recipe
from ernie_quant.resolve import Table, refuse_quantized, resolve, resolve_quantized
from ernie_quant.runtimes import Linear

if TYPE_CHECKING:
    from ernie_quant.report import TensorReport

SHARD_BYTES = 5_000_000_000  # the field's usual size of an output file
FLOATS = ("BF16", "F16", "F32")
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Step:
    """One tensor of the result: where it comes from, what is done to it, what is stored."""

    name: str
    role: str
    view: View
    spec: TensorSpec
    codec: Codec
    parts: Mapping[str, TensorSpec]
    sources: tuple[str, ...]
    multiple: int = 1  # rows that must stay together in a slab
    group: str = ""  # steps of one group, one after the other, stay in one file

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(spec.nbytes for spec in self.parts.values())

    @property
    def quantized(self) -> bool:
        """Does it change?"""
        return not isinstance(self.codec, Keep)

    def slabs(self) -> list[tuple[int, int]]:
        """Ranges of rows that together are the tensor."""
        return views.slabs(self.spec, self.multiple)


@dataclass(frozen=True)
class Shard:
    """One file of the result (its name may have a subfolder); `specs` in the order in which the tensors lie in it."""

    filename: str
    steps: tuple[Step, ...]
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes_in(self) -> int:
        """Bytes of the tensors that it is made from."""
        return sum(step.spec.nbytes for step in self.steps)

    @property
    def needs(self) -> tuple[Path, ...]:
        """Files of the source that it is made from, in order of their first use."""
        return tuple(dict.fromkeys(ref.file for step in self.steps for ref in views.refs(step.view)))


@dataclass(frozen=True)
class Plan:
    """All that a run needs to know."""

    source: Checkpoint
    runtime: str
    layout: str
    recipe: Recipe
    shards: tuple[Shard, ...]
    dims: Mapping[str, int]
    config: Mapping[str, Any]
    copies: tuple[Path, ...]
    tp_sizes: tuple[int, ...]
    notes: tuple[str, ...]
    identity: Identity
    shard_bytes: int = SHARD_BYTES
    weights: int = 0  # elements of the model, where the steps do not tell
    reports: tuple[TensorReport, ...] | None = None  # of an earlier run whose weights are only moved here
    quantized_by: Plan | None = None  # the plan whose result, which is not kept, this one shares among ranks

    @property
    def origin(self) -> Checkpoint:
        """What a user calls the source."""
        return (self.quantized_by or self).source

    @property
    def steps(self) -> list[Step]:
        """All steps, in order of the result's names."""
        return [step for shard in self.shards for step in shard.steps]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(step.nbytes for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the result's weight files and of what is carried along."""
        from ernie_quant.writer import header_bytes

        metadata = file_metadata(self)
        heads = sum(len(header_bytes(shard.specs, metadata)) for shard in self.shards)
        return self.nbytes + heads + sum(path.stat().st_size for path in self.copies)

    @property
    def folders(self) -> dict[str, list[Shard]]:
        """Subfolder ("" for the root) -> its files."""
        found: dict[str, list[Shard]] = {}
        for shard in self.shards:
            found.setdefault(shard.filename.rpartition("/")[0], []).append(shard)
        return found


def file_metadata(plan: Plan) -> dict[str, str]:
    """`__metadata__` of the result's files: transformers refuses PT files without it."""
    return {"format": "np" if plan.layout == names.PADDLE else "pt"}


def make_plan(
    source: Checkpoint,
    *,
    runtime: str,
    recipe: Recipe = recipe.KEEP_ALL,
    vl_config: str = "flat",
    fixes: frozenset[str] = frozenset(),
    copy_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
    unsupported: bool = False,
    dequantize: bool = False,
) -> Plan:
    """Decide everything. Raises PlanError with every problem found, or ConfigError."""
    target = runtimes.find(runtime)
    if not dequantize:
        refuse_quantized(source)
    table = resolve_quantized(source) if dequantize else resolve(source, fixes)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    weights = table.map.write(table.weights, target.LAYOUT)
    chosen, problems, notes = _codecs(weights, recipe, target)
    linears = _linears(chosen)
    refused = target.unsupported(linears)
    problems += [*recipe.unused(weights), *target.problems(linears), *([] if unsupported else refused)]
    if problems:
        raise PlanError(f"{source.folder}: cannot be done as asked", _folded(problems))
    steps = [_step(weight, codec, spec, target) for weight, codec, spec in chosen]
    copies, left = _copies(source, copy_code)
    config = _config(table, target.LAYOUT, vl_config, steps, copy_code)
    if (entry := target.quantization_config(linears)) is not None:
        _check_promise(target, entry, linears)
        config |= target.CONFIG | {"quantization_config": entry}
    shards = _shards(steps, target, shard_bytes)
    tp = target.tp_sizes(linears, table.map.dims, whole(table.config, "num_attention_heads"))
    options = {
        "vl_config": vl_config, "fixes": fixes, "copy_code": copy_code, "max_shard_bytes": shard_bytes, "dequantize": dequantize
    }  # fmt: skip
    return Plan(
        source, runtime, target.LAYOUT, recipe, shards, table.map.dims, config, copies, tuple(tp),
        (*source.notes, *left, *notes, *refused, *target.notes(linears)),
        identity(source, runtime, recipe, options), shard_bytes,
    )  # fmt: skip


Chosen = tuple[Weight, Codec, TensorSpec]


def _codecs(weights: Sequence[Weight], rules: Recipe, target: ModuleType) -> tuple[list[Chosen], list[str], list[str]]:
    """A codec for every tensor, what does not fit, and what is kept because it does not fit."""
    chosen: list[Chosen] = []
    problems: list[str] = []
    unfit: list[str] = []
    spoiled: set[str] = set()  # layers in memory of which a part does not fit
    for weight in weights:
        codec = rules.codec_for(weight)
        spec = views.spec_of(oriented(weight, codec, target.LAYOUT))
        problem = codec.problem(spec)
        if spec.dtype not in FLOATS:
            problems.append(f"{weight.name}: is {spec.dtype}, not one of {', '.join(FLOATS)}")
        elif problem and rules.keep_unfit:
            unfit.append(f"{weight.name}: {problem}")
            spoiled.add(target.layer_of(weight.name, weight.role))
        elif problem:
            problems.append(f"{weight.name}: {problem}")
        chosen.append((weight, codec, spec))
    # a layer in memory has one form: with one of its tensors the others are kept
    before = sum(not isinstance(codec, Keep) for _, codec, _ in chosen)
    for i, (weight, _, _) in enumerate(chosen):
        if target.layer_of(weight.name, weight.role) in spoiled:
            chosen[i] = (weight, KEEP, views.spec_of(weight.view))
    notes = [f"kept, because {line}" for line in _folded(unfit)]
    if others := before - sum(not isinstance(codec, Keep) for _, codec, _ in chosen) - len(unfit):
        notes.append(f"{others} more tensors are kept, as parts of the same layers")
    return chosen, problems, notes


def _step(weight: Weight, codec: Codec, spec: TensorSpec, target: ModuleType) -> Step:
    multiple = math.lcm(codec.rows, 1 if isinstance(codec, Keep) else target.ROWS)
    view = oriented(weight, codec, target.LAYOUT)
    return Step(weight.name, weight.role, view, spec, codec, target.parts(weight.name, codec, spec), weight.sources, multiple)


def oriented(weight: Weight, codec: Codec, layout: str) -> View:
    """Codecs work on [out, in], whatever the layout of the result."""
    turn = not isinstance(codec, Keep) and layout == names.PADDLE
    return views.transpose(weight.view) if turn else weight.view


def _linears(chosen: Sequence[Chosen]) -> list[Linear]:
    """The layers that a runtime's configuration speaks of."""
    return [Linear(w.name, spec, w.role, codec) for w, codec, spec in chosen if names.is_layer(w.name, w.role, spec.shape)]


def _check_promise(target: ModuleType, entry: Mapping[str, Any], linears: Sequence[Linear]) -> None:
    """config.json is derived from what is written; here it is read back and must say the same."""
    promised = target.codecs_of(entry, [(li.name, li.spec) for li in linears])
    for linear in linears:
        assert target.parts(linear.name, promised[linear.name], linear.spec) == target.parts(
            linear.name, linear.codec, linear.spec
        ), f"{linear.name}: config.json promises {promised[linear.name].describe()}, the plan says {linear.codec.describe()}"


def _folded(lines: Sequence[str]) -> list[str]:
    """One line for all that differ in the numbers of their names only."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        name, _, rest = line.partition(": ")
        groups.setdefault(names.folded(name) + ": " + rest, []).append(line)
    return [group[0] if len(group) == 1 else f"{key} ({len(group)} tensors)" for key, group in groups.items()]


def _copies(source: Checkpoint, copy_code: bool) -> tuple[tuple[Path, ...], list[str]]:
    code = [p for p in source.extra_files if p.suffix == ".py"]
    if copy_code or not code:
        return tuple(source.extra_files), []
    kept = tuple(p for p in source.extra_files if p.suffix != ".py")
    return kept, [f"Python files are not carried along: {', '.join(p.name for p in code)}; --copy-code does it"]


def _config(table: Table, layout: str, vl_config: str, steps: Sequence[Step], copy_code: bool) -> dict[str, Any]:
    dtype = next(s.spec.dtype for s in steps if s.role == EMBED)
    if dtype not in TORCH_NAMES:
        raise ConfigError(f"the embeddings are {dtype}, not one of {', '.join(TORCH_NAMES)}")
    dims = table.map.dims
    shared = dims.get("MS", 0) // dims["M"] if "M" in dims else 0
    facts = Facts(TORCH_NAMES[dtype], shared, len(table.map.ids.get("mtp", ())))
    spelling = "transformers" if vl_config == "transformers" and layout == names.PT else layout
    config: dict[str, Any] = table.arch.config_for(spelling, table.config, facts)
    if not copy_code:  # it would point to files that are not there
        config.pop("auto_map", None)
    return config


def _shards(steps: Sequence[Step], target: ModuleType, shard_bytes: int) -> tuple[Shard, ...]:
    """Steps in order, by folder, cut into files of at most `shard_bytes` (a larger tensor has a file of its own)."""
    prequantized = any(step.quantized for step in steps)  # a plain result is one folder, as the published ones are
    folders: dict[str, list[Step]] = {}
    for step in steps:
        folders.setdefault(target.folder(step.role) if prequantized else "", []).append(step)
    return tuple(shard for folder, inside in folders.items() for shard in files(folder, inside, shard_bytes))


def files(folder: str, steps: Sequence[Step], shard_bytes: int) -> list[Shard]:
    """The files of one folder."""
    groups: list[list[Step]] = [[]]
    size = 0
    for _, members in itertools.groupby(steps, lambda step: step.group or step.name):
        together = list(members)
        nbytes = sum(step.nbytes for step in together)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1] += together
        size += nbytes
    total, prefix = len(groups), f"{folder}/" if folder else ""
    filenames = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)] if total > 1 else ["model.safetensors"]
    return [Shard(prefix + f, tuple(g), _file_order(g)) for f, g in zip(filenames, groups, strict=True)]


def _file_order(steps: Sequence[Step]) -> dict[str, TensorSpec]:
    """Step after step, so that writing is sequential; tensors of odd sizes last, so that every start is aligned."""
    specs = [(name, spec) for step in steps for name, spec in step.parts.items()]
    aligned = [item for item in specs if item[1].nbytes % 8 == 0]
    odd = [item for item in specs if item[1].nbytes % 8]
    return dict(aligned + sorted(odd, key=lambda item: -ITEMSIZE[item[1].dtype]))


def summary(plan: Plan) -> list[dict[str, Any]]:
    """What happens to each group of tensors; names folded over their numbers."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for step in plan.steps:
        key = (names.folded(step.name), step.codec.describe())
        row = groups.setdefault(
            key, {"name": key[0], "role": step.role, "codec": key[1], "tensors": 0, "bytes_in": 0, "bytes_out": 0}
        )
        row["tensors"] += 1
        row["bytes_in"] += step.spec.nbytes
        row["bytes_out"] += step.nbytes
    return list(groups.values())


def bits_per_weight(plan: Plan) -> float:
    """Stored bits per element over all tensors."""
    return 8 * plan.nbytes / max(1, plan.weights or sum(s.spec.numel for s in plan.steps))
