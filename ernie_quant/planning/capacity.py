"""How many GPUs a checkpoint takes in each form that can be made of it, or as it is; from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import KEEP, Keep
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


@dataclass(frozen=True)
class Question:
    """What is asked of every form: the fewest of these GPUs that hold it, or what `count` of them have room for."""

    limits: Limits = field(default_factory=Limits)
    gpus: Sequence[Gpu] = (find(USUAL),)
    count: int | None = None

    def fits(self, held: Held, ways: Sequence[Spread], model: Model) -> tuple[Fit, ...]:
        """The answer for every kind of GPU."""
        if self.count is None:
            return tuple(fewest(held, ways, model, gpu, self.limits) for gpu in self.gpus)
        return tuple(on(held, ways, model, gpu, self.limits, self.count) for gpu in self.gpus)

    def ways(self, target: Runtime, linears: Sequence[Linear], model: Model) -> list[Spread]:
        """How a program's GPUs may share it."""
        most = max(self.count or 0, MOST_GPUS)
        return _sharing.spreads(target, linears, model.dims, model.heads, layers=model.layers, most=most)

    def kv_bytes(self, model: Model) -> int:
        """Of a token, over all GPUs."""
        return int(model.kv_bytes(self.limits.kv_dtype, Spread(), model.layers))


def estimate(
    source: Checkpoint, question: Question = Question(), *,
    wint4_layers: int = built_in.WINT4_LAYERS, recipe: Recipe | None = None,
) -> Estimate:  # fmt: skip
    """A row per form, and for `recipe` one more; the MTP block is not counted. Raises PlanError or ConfigError."""
    if evidence(source):
        return Estimate(tuple(_as_it_is(source, question)), {})
    table = resolve(source)
    if table.problems:
        raise PlanError(f"{source.folder}: {len(table.problems)} problem(s) in the checkpoint", table.problems)
    few = offers.representatives(table.weights)
    model = Model.of(table.config, table.map.dims)
    asked = [(offer, few) for offer in offers.all_offers(wint4_layers)]
    if recipe is not None:  # it may tell experts apart
        own = Offer(f"quantize --recipe {recipe.name}.toml", recipe.runtime or built_in.VLLM, recipe)
        asked.append((own, [(weight, 1) for weight in table.weights]))
    rows, refused = [], {}
    for offer, weights in asked:
        counts = {weight.row.paddle: count for weight, count in weights}
        joined = LAYOUTS[offer.target.LAYOUT].join([weight for weight, _ in weights])
        made = offers.make(offer, source, table, [(weight, counts[weight.row.paddle]) for weight in joined])
        if isinstance(made, Made):
            rows.append(_row(made, model, question))
        else:
            refused[offer.words] = made[0]
    return Estimate(tuple(rows), refused)


def _row(made: Made, model: Model, question: Question) -> Row:
    offer, items = made.offer, items_of(made)
    linears = made.linears if not offer.as_kept else [replace(li, codec=KEEP) for li in made.linears]
    held = Held.of(items, model.layers)
    disk = sum(item.nbytes for item in items) if offer.command else 0
    hours = effort.core_hours(made.chosen, made.counts) if offer.command else None
    per_rank = offer.target.PER_RANK and not offer.at_load and any(not isinstance(c.codec, Keep) for c in made.chosen)
    return Row(
        offer.words, offer.target.PROGRAM, offer.command, offer.at_load, int(held.total), question.kv_bytes(model),
        tp_sizes(offer.target, linears, model), int(disk), hours, per_rank,
        question.fits(held, question.ways(offer.target, linears, model), model),
    )  # fmt: skip


def _as_it_is(source: Checkpoint, question: Question) -> Iterator[Row]:
    """A quantized checkpoint, ours or another's, and what `reshard` makes of it."""
    found = published.read(source)
    model = Model.of(found.config, found.dims)
    held = Held.of(found.items, model.layers)
    ways = question.ways(found.target, found.linears, model)
    here, others = ways, []
    if found.target.PER_RANK:
        here = [spread for spread in ways if spread.tensor == len(source.ranks)]
        others = [spread for spread in ways if spread not in here] if found.ours else []
        here = here or [Spread(len(source.ranks))]  # of another's, whose groups we do not know
    for form, command, some in (
        (f"as it is ({found.title})", "", here), ("reshard --tp N", "ernie-quant reshard SRC OUT --tp N", others),
    ):  # fmt: skip
        if some or not command:
            whole = [spread.tensor for spread in some if spread.stages == 1 and not spread.experts_whole]
            sizes = tuple(whole) if TENSOR in found.target.PARALLEL else ()
            yield Row(
                form, found.target.PROGRAM, command, False, int(held.total), question.kv_bytes(model), sizes,
                int(held.total) if command else 0, None, bool(command), question.fits(held, some, model),
            )  # fmt: skip


def tp_sizes(target: Runtime, linears: Sequence[Linear], model: Model) -> tuple[int, ...]:
    """Tensor-parallel sizes for a result; none of a program that shares no layers."""
    if TENSOR not in target.PARALLEL:
        return ()
    return _sharing.tp_sizes(target, linears, model.dims, model.heads)


def gpus_needed(items: Iterable[Item], target: Runtime, linears: Sequence[Linear], model: Model) -> dict[str, Spread]:
    """How GPUs of each memory that people have share the result, with one sequence of 32768 tokens; fewest of them."""
    question = Question(gpus=[of_memory(gib * GIB) for gib in OF_CARDS])
    fits = question.fits(Held.of(items, model.layers), question.ways(target, linears, model), model)
    return {fit.gpu: fit.spread for fit in fits if fit.spread is not None}


def items_of(made: Made) -> list[Item]:
    """Their stored bytes, as the runtime stores them."""
    target, found = made.offer.target, []
    for choice, count in zip(made.chosen, made.counts, strict=True):
        parts = target.parts(choice.weight.name, choice.codec, choice.spec).values()
        found.append(Item(choice.weight.name, choice.weight.role, count * sum(part.spec.nbytes for part in parts)))
    return found
