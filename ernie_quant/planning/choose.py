"""A codec for every weight: which one, what does not fit, and what a runtime sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ernie_quant import names
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec
from ernie_quant.codecs._rounded import Rounded
from ernie_quant.codecs.keep import KEEP, Keep
from ernie_quant.dtypes import FLOATS, TORCH_NAMES
from ernie_quant.names import Weight
from ernie_quant.planning.as_stored import codec_of
from ernie_quant.planning.recipe import Recipe
from ernie_quant.runtimes import Linear, Runtime
from ernie_quant.views import build
from ernie_quant.views.kinds import View, spec_of
from ernie_quant.weights.layouts import LAYOUTS, Layout


@dataclass(frozen=True)
class Choice:
    """A weight of the result, its codec, and the spec of what the codec is given."""

    weight: Weight
    codec: Codec
    spec: TensorSpec


@dataclass(frozen=True)
class Choices:
    """All of them, what does not fit, and what is kept because it does not fit."""

    chosen: tuple[Choice, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def choose(
    weights: Sequence[Weight], rules: Recipe, target: Runtime, *, narrow: bool = False, as_stored: bool = False
) -> Choices:  # fmt: skip
    """A codec for every weight of a result for `target`. Raises PlanError.

    `narrow`: kept float32 becomes bfloat16, but for routers. `as_stored`: that of a quantized source, whatever the rules say.
    """
    layout = LAYOUTS[target.LAYOUT]
    chosen: list[Choice] = []
    problems: list[str] = []
    unfit: list[str] = []
    instead: list[str] = []
    unfit_layers: set[str] = set()  # layers in memory of which a part does not fit
    roles = {weight.role for weight in weights}
    for weight in weights:
        codec = codec_of(weight, target) if as_stored else target.suited(rules.codec_for(weight), roles)
        spec = spec_of(oriented(weight, codec, layout))
        if codec == Rounded(spec.dtype):
            codec = KEEP
        problem = codec.problem(spec)
        if spec.dtype not in FLOATS:
            problems.append(f"{weight.name}: is {spec.dtype}, not one of {', '.join(FLOATS)}")
        elif weight.role in names.VOCABULARY and not (isinstance(codec, Keep) or target.QUANTIZES_VOCABULARY):
            problems.append(f"{weight.name}: {codec.describe()} of the {weight.role} is for GGUF files; leave the rule out")
        elif problem and rules.keep_unfit and (other := target.fallback(codec, spec)) is not None:
            instead.append(f"{weight.name}: {problem}; stored as {other.describe()}")
            codec = other
        elif problem and rules.keep_unfit:
            unfit.append(f"{weight.name}: {problem}")
            unfit_layers.add(target.layer_of(weight.name, weight.role))
        elif problem:
            problems.append(f"{weight.name}: {problem}")
        chosen.append(Choice(weight, codec, spec))
    # a layer in memory has one form: with one of its tensors the others are kept
    fitting = [_kept(c) if target.layer_of(c.weight.name, c.weight.role) in unfit_layers else c for c in chosen]
    notes = [f"kept, because {line}" for line in folded_problems(unfit)]
    notes += folded_problems(instead)
    if others := _quantized(chosen) - _quantized(fitting) - len(unfit):
        notes.append(f"{others} more tensors are kept, as parts of the same layers")
    quantized = _quantized(fitting) > 0
    rounded = [_as_kept(c, target.kept_as(c.weight.role, c.spec, quantized=quantized)) for c in fitting]
    if narrow:
        rounded = [
            _as_kept(c, "BF16" if c.weight.role != names.ROUTER and c.spec.dtype == "F32" else c.spec.dtype) for c in rounded
        ]
    return Choices(tuple(rounded), tuple(problems), (*notes, *_rounding_notes(rounded, beside=not narrow)))


def _as_kept(choice: Choice, dtype: str) -> Choice:
    """What no rule changes, in the dtype that the runtime wants."""
    if choice.codec != KEEP or choice.spec.dtype == dtype:
        return choice
    return replace(choice, codec=Rounded(dtype))


def _rounding_notes(chosen: Sequence[Choice], *, beside: bool) -> list[str]:
    notes = []
    for dtype in ("BF16", "F16"):  # float32 holds all values
        rounded = [c for c in chosen if c.codec == Rounded(dtype)]
        were = " and ".join(sorted({TORCH_NAMES[c.spec.dtype] for c in rounded if c.spec.dtype != dtype}))
        because = ", the dtype of the scales beside them" if dtype == "BF16" and beside else ""
        notes += [f"{len(rounded)} tensors that are kept are {were}: rounded to {TORCH_NAMES[dtype]}{because}"] if were else []
    return notes


def _kept(choice: Choice) -> Choice:
    return Choice(choice.weight, KEEP, spec_of(choice.weight.view))


def _quantized(chosen: Sequence[Choice]) -> int:
    return sum(not isinstance(c.codec, Keep) for c in chosen)


def oriented(weight: Weight, codec: Codec, layout: Layout) -> View:
    """Codecs work on [out, in], whatever the layout of the result."""
    turn = not isinstance(codec, Keep) and not layout.out_first
    return build.transpose(weight.view) if turn else weight.view


def linears_of(chosen: Sequence[Choice], target: Runtime) -> list[Linear]:
    """The layers that a runtime's configuration speaks of."""
    layout, vocabulary = LAYOUTS[target.LAYOUT], target.QUANTIZES_VOCABULARY
    layers = [c for c in chosen if names.is_layer(c.weight.name, c.weight.role, c.spec.shape, vocabulary=vocabulary)]
    return [layout.linear(c.weight.name, c.weight.row.rule, c.codec, c.spec) for c in layers]


def folded_problems(lines: Sequence[str]) -> list[str]:
    """One line for all that differ in the numbers of their names only."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        name, _, rest = line.partition(": ")
        groups.setdefault(names.folded(name) + ": " + rest, []).append(line)
    return [group[0] if len(group) == 1 else f"{key} ({len(group)} tensors)" for key, group in groups.items()]
