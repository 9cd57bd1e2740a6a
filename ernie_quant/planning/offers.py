"""What can be made of a plain checkpoint, each with the command that makes it, and what programs make of it when they load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ernie_quant import runtimes
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs.keep import Keep
from ernie_quant.names import Weight, starred
from ernie_quant.planning import built_in, command
from ernie_quant.planning.choose import Choice, choose, folded_problems, linears_of
from ernie_quant.planning.recipe import Recipe
from ernie_quant.runtimes import About, Linear, Runtime
from ernie_quant.views.kinds import spec_of
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.plain import Resolved

GGUF = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
GROUPS = (128, 64, 32, "channel")
KEEP_UNFIT = "--keep-unfit"


@dataclass(frozen=True)
class Offer:
    """A form of a model: what of `ernie-quant` makes it, without SRC and OUT, or the option of the program that does.

    `as_kept`: the program shares the plain weights and quantizes its shares, so that groups are never cut.
    """

    words: str
    runtime: str
    recipe: Recipe
    at_load: bool = False
    as_kept: bool = False

    @property
    def target(self) -> Runtime:
        """The program."""
        return runtimes.find(self.runtime)

    @property
    def command(self) -> str:
        """What to type."""
        return "" if self.at_load else command.full(self.words, "SRC", "OUT")


@dataclass(frozen=True)
class Made:
    """An offer that can be made: codecs of `chosen`, each of which stands for `counts` weights like it."""

    offer: Offer
    chosen: tuple[Choice, ...]
    counts: tuple[int, ...]
    linears: tuple[Linear, ...]


def all_offers(wint4_layers: int) -> list[Offer]:
    """Program by program, the largest first."""
    vllm, fastdeploy, llama_cpp = built_in.VLLM, built_in.FASTDEPLOY, built_in.LLAMA_CPP
    offers = [_of("pt", vllm)]
    offers.append(Offer(runtimes.find(vllm).AT_LOAD["fp8"], vllm, built_in.make("fp8").recipe, at_load=True, as_kept=True))
    for name in ("fp8", "wint8"):
        offers += [_of(name, vllm), _of(name, vllm, experts_only=True)]
    offers += [_of("wint4", vllm, group_size=group) for group in GROUPS]
    offers += [_of("wint4", vllm, experts_only=True, group_size=group) for group in GROUPS]
    for name, options in (("wint4", {"activations": "fp8"}), ("mxfp4", {}), ("nvfp4", {})):
        offers += [_of(name, vllm, **options), _of(name, vllm, experts_only=True, **options)]
    offers.append(_with_text(_of("nvfp4", vllm, activations="fp4")))
    offers += [_of("wint2", vllm, wint4_layers=wint4_layers), _of("wint2", vllm, wint4_layers=wint4_layers, experts_only=True)]
    offers.append(_of("paddle", fastdeploy))
    at_load = {"wint8": built_in.all_wint8(), "wint4": built_in.fastdeploy_container("wint4", None)}
    offers += [Offer(words, fastdeploy, at_load[k], at_load=True) for k, words in runtimes.find(fastdeploy).AT_LOAD.items()]
    offers.append(_of("wint4", fastdeploy))
    offers.append(_with_text(_of("w4a8", fastdeploy)))
    offers.append(_of("wint2", fastdeploy, wint4_layers=wint4_layers))
    return offers + [_of("gguf", llama_cpp, type=kind) for kind in GGUF]


def _of(name: str, runtime: str, **options: object) -> Offer:
    """A short command with options."""
    recipe = built_in.make(name, runtime, **options).recipe
    return Offer(recipe.words, runtime, recipe)


def _with_text(offer: Offer) -> Offer:
    """It is nothing without."""
    return replace(offer, words=f"{offer.words} --calibration auto")


def make(offer: Offer, source: Checkpoint, table: Resolved, weights: Sequence[tuple[Weight, int]]) -> Made | list[str]:
    """The offer, with --keep-unfit if it can be made so only; or why it cannot be made."""
    target, layout = offer.target, LAYOUTS[offer.target.LAYOUT]
    if problem := layout.problem(table.map.dims):
        return [problem]
    alone = [weight for weight, _ in weights]
    recipe = offer.recipe.for_model(table.map)
    choices = choose(alone, recipe, target)
    if choices.problems and not target.PER_RANK and not recipe.keep_unfit:
        offer = replace(offer, words=f"{offer.words} {KEEP_UNFIT}", recipe=replace(offer.recipe, keep_unfit=True))
        return make(offer, source, table, weights)
    linears = linears_of(choices.chosen, target)
    about = About(source, table.config, table.map, recipe.name, [(c.codec, c.spec.numel) for c in choices.chosen])
    problems = [*choices.problems, *recipe.unused(alone)]
    if not offer.at_load:  # what is stored is a plain checkpoint
        problems += [*target.problems(linears), *target.model_problems(about), *target.unsupported(linears)]
    if offer.words.endswith(KEEP_UNFIT) and all(isinstance(c.codec, Keep) for c in choices.chosen):
        problems.append("no weight of this model fits it")
    if problems:
        return folded_problems(problems)
    return Made(offer, choices.chosen, tuple(count for _, count in weights), tuple(linears))


def representatives(weights: Sequence[Weight]) -> list[tuple[Weight, int]]:
    """One expert for all of a layer that are alike, with their number; a built-in recipe tells them not apart."""
    rows: dict[str, list[Weight]] = {}
    for weight in weights:
        rows.setdefault(weight.row.paddle, []).append(weight)
    alike: dict[tuple[object, ...], list[list[Weight]]] = {}
    for row in rows.values():
        key = (row[0].row.rule, starred(row[0].row.paddle), tuple(spec_of(weight.view) for weight in row))
        alike.setdefault(key, []).append(row)
    return [(weight, len(group)) for group in alike.values() for weight in group[0]]
