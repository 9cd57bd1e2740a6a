"""How many GPUs a checkpoint takes in each form that can be made of it, or as it is; from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import KEEP
from ernie_quant.errors import PlanError
from ernie_quant.planning import built_in, effort, offers, published
from ernie_quant.planning.fit import MOST_GPUS, Fit, fewest, on
from ernie_quant.planning.gpus import GIB as GIB
from ernie_quant.planning.gpus import OF_CARDS, USUAL, Gpu, Limits, find, of_memory
from ernie_quant.planning.held import Held, Item, Model
from ernie_quant.planning.offers import Made, Offer
from ernie_quant.planning.recipe import Recipe
from ernie_quant.runtimes import Linear, Runtime, Spread, _sharing
from ernie_quant.runtimes._values import TENSOR
from ernie_quant.weights.claims import evidence
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.plain import resolve

PLAIN = "convert --to paddle"


@dataclass(frozen=True)
class Row:
    """One form; sizes in bytes. `command` makes it, unless the program does `at_load` or it is there already.

    `hours` of one core, and `disk_bytes`, of making it; `fits` has an entry for every kind of GPU that was asked for.
    """

    form: str
    program: str
    command: str
    at_load: bool
    weight_bytes: int
    kv_bytes_per_token: int  # over all kv heads
    tp_sizes: tuple[int, ...]
    disk_bytes: int
    core_hours: float | None
    per_rank: bool  # its files are made for one number of GPUs
    fits: tuple[Fit, ...]


@dataclass(frozen=True, repr=False)
class Estimate:
    """All rows, and what cannot be made: form -> the first reason."""

    rows: tuple[Row, ...]
    refused: Mapping[str, str]

    def __repr__(self) -> str:
        return f"<Estimate of {len(self.rows)} forms: {', '.join(row.form for row in self.rows)}>"


def estimate(
    source: Checkpoint, limits: Limits = Limits(), gpus: Sequence[Gpu] = (find(USUAL),), *,  # noqa: B008 - frozen
    count: int | None = None, wint4_layers: int = built_in.WINT4_LAYERS, recipe: Recipe | None = None,
) -> Estimate:  # fmt: skip
    """A row per form; the MTP block is not counted. `count`: what so many GPUs have room for, instead of the fewest.

    Raises PlanError or ConfigError.
    """
    if evidence(source):
        return Estimate(tuple(_as_it_is(source, limits, gpus, count)), {})
    table = resolve(source)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    few = offers.representatives(table.weights)
    model = Model.of(table.config, table.map.dims)
    asked = [(offer, few) for offer in offers.all_offers(wint4_layers)]
    if recipe is not None:  # it may tell experts apart
        own = Offer(f"quantize --recipe {recipe.name}.toml", built_in.VLLM, recipe)
        asked.append((own, [(weight, 1) for weight in table.weights]))
    rows, refused = [], {}
    for offer, weights in asked:
        counts = {weight.row.paddle: count for weight, count in weights}
        joined = LAYOUTS[offer.target.LAYOUT].join([weight for weight, _ in weights])
        made = offers.make(offer, source, table, [(weight, counts[weight.row.paddle]) for weight in joined])
        if isinstance(made, Made):
            rows.append(_row(made, model, limits, gpus, count))
        else:
            refused[offer.words] = made[0]
    return Estimate(tuple(rows), refused)


def _row(made: Made, model: Model, limits: Limits, gpus: Sequence[Gpu], count: int | None) -> Row:
    offer, items = made.offer, items_of(made)
    linears = made.linears if not offer.as_kept else [replace(li, codec=KEEP) for li in made.linears]
    held = Held.of(items, model.layers)
    disk = sum(item.nbytes for item in items) if offer.command else 0
    hours = effort.core_hours(made.chosen, made.counts) if offer.command else None
    fits = _fits(offer.target, linears, held, model, limits, gpus, count)
    sizes = tp_sizes(offer.target, linears, model)
    return Row(
        offer.words, offer.target.PROGRAM, offer.command, offer.at_load, int(held.total), _per_token(model, limits), sizes,
        int(disk), hours, offer.target.PER_RANK and bool(offer.command) and offer.words != PLAIN, fits,
    )  # fmt: skip


def _as_it_is(source: Checkpoint, limits: Limits, gpus: Sequence[Gpu], count: int | None) -> list[Row]:
    """A quantized checkpoint, ours or another's, and what `reshard` makes of it."""
    found = published.read(source)
    model = Model.of(found.config, found.dims)
    held, per_token = Held.of(found.items, model.layers), _per_token(model, limits)
    ways = _spreads(found.target, found.linears, model)
    here = [spread for spread in ways if not found.target.PER_RANK or spread.tensor == len(source.ranks)]
    form = f"as it is ({found.title})"
    if found.target.PER_RANK and not here:  # of another's, whose groups we do not know
        here = [Spread(len(source.ranks))]
    rows = [_stored_row(form, "", held, here, model, limits, gpus, count, found.target, per_token)]
    others = [spread for spread in ways if spread not in here]
    if found.target.PER_RANK and found.ours and others:
        words = "ernie-quant reshard SRC OUT --tp N"
        rows.append(_stored_row("reshard --tp N", words, held, others, model, limits, gpus, count, found.target, per_token))
    return rows


def _stored_row(
    form: str, command: str, held: Held, ways: Sequence[Spread], model: Model, limits: Limits, gpus: Sequence[Gpu],
    count: int | None, target: Runtime, per_token: int,
) -> Row:  # fmt: skip
    fits = tuple(_one_fit(held, ways, model, gpu, limits, count) for gpu in gpus)
    whole = [spread.tensor for spread in ways if spread.stages == 1 and not spread.experts_whole]
    sizes = tuple(whole) if TENSOR in target.PARALLEL else ()
    disk = int(held.total) if command else 0
    return Row(form, target.PROGRAM, command, False, int(held.total), per_token, sizes, disk, None, bool(command), fits)


def _fits(
    target: Runtime, linears: Sequence[Linear], held: Held, model: Model, limits: Limits, gpus: Sequence[Gpu], count: int | None
) -> tuple[Fit, ...]:  # fmt: skip
    ways = _spreads(target, linears, model, count or MOST_GPUS)
    return tuple(_one_fit(held, ways, model, gpu, limits, count) for gpu in gpus)


def _one_fit(held: Held, ways: Sequence[Spread], model: Model, gpu: Gpu, limits: Limits, count: int | None) -> Fit:
    return fewest(held, ways, model, gpu, limits) if count is None else on(held, ways, model, gpu, limits, count)


def _spreads(target: Runtime, linears: Sequence[Linear], model: Model, most: int = MOST_GPUS) -> list[Spread]:
    most = max(most, MOST_GPUS)
    return _sharing.spreads(target, linears, model.dims, model.heads, layers=model.layers, most=most)


def tp_sizes(target: Runtime, linears: Sequence[Linear], model: Model) -> tuple[int, ...]:
    """Tensor-parallel sizes for a result; none of a program that shares no layers."""
    if TENSOR not in target.PARALLEL:
        return ()
    return _sharing.tp_sizes(target, linears, model.dims, model.heads)


def gpus_needed(items: Iterable[Item], target: Runtime, linears: Sequence[Linear], model: Model) -> dict[str, Spread]:
    """How GPUs of each memory that people have share the result, with one sequence of 32768 tokens; fewest of them."""
    held = Held.of(items, model.layers)
    fits = _fits(target, linears, held, model, Limits(), [of_memory(gib * GIB) for gib in OF_CARDS], None)
    return {fit.gpu: fit.spread for fit in fits if fit.spread is not None}


def items_of(made: Made) -> list[Item]:
    """Their stored bytes, as the runtime stores them."""
    target, found = made.offer.target, []
    for choice, count in zip(made.chosen, made.counts, strict=True):
        parts = target.parts(choice.weight.name, choice.codec, choice.spec).values()
        found.append(Item(choice.weight.name, choice.weight.role, count * sum(part.spec.nbytes for part in parts)))
    return found


def _per_token(model: Model, limits: Limits) -> int:
    return int(model.kv_bytes(limits.kv_dtype, Spread(), model.layers))
