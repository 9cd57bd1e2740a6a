"""Names as compilers and trainers leave them, under the names of the model: wrappers around modules, and buffers.

A wrapper stands in the name of every tensor of the module that it wraps, so it is left out of all of them or refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ernie_quant.checkpoint import TensorRef

# around any module: torch.compile, DataParallel and DeepSpeed, FSDP, activation checkpoints
WORDS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# around the whole model, and names that only a wrapped one has: PEFT's merged adapters, and classes with a model of their own
FRONTS = {
    "base_model.model.": ("base_model.model.",),
    "model.": ("model.model.", "model.ernie.", "model.lm_head."),
}
EMBEDDINGS = ("model.embed_tokens.weight", "ernie.embed_tokens.weight", "model.language_model.embed_tokens.weight")
MOST_FRONTS = 4  # one in the other
MOST_PARTS = 32  # of a name that is looked into; a model's own have up to 9
# what every loader computes anew from config.json, or what only training counts
BUFFERS = re.compile(
    r"(^|\.)rotary(_pos)?_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached|cos_sin_cache)$|\.moe_statics\.expert_usage$"
)
ROOTS = ("model.", "ernie.")
BASE = ("embed_tokens.weight", "language_model.embed_tokens.weight")  # where the model was saved without its head


@dataclass
class Unwrapped:
    """The tensors of every rank by their names in the model, what was left out, and what cannot be read so."""

    ranks: list[dict[str, TensorRef]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def unwrapped(ranks: Sequence[Mapping[str, TensorRef]]) -> Unwrapped:
    """Every rank's tensors by their names in the model."""
    found = Unwrapped()
    for refs in ranks:
        names, notes, problems = _names_in_model(refs)
        kept: dict[str, TensorRef] = {}
        buffers = {name: real for name, real in names.items() if BUFFERS.search(real)}
        left = set(buffers.values())
        for name, real in names.items():
            if real in kept:
                problems.append(f"{name} and {kept[real].name}: both are {real}; take one of them away")
            kept.setdefault(real, refs[name])
        if buffers:
            such_as = f"{_number(list(buffers))}, such as {next(iter(buffers)):.200}"
            notes.append(f"left out: {such_as}, that loaders compute or do not know (buffers, counts of training)")
        found.ranks.append({real: ref for real, ref in kept.items() if real not in left})
        found.notes += notes
        found.problems += problems
    return replace(found, notes=list(dict.fromkeys(found.notes)), problems=list(dict.fromkeys(found.problems)))


def _names_in_model(names: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Stored name -> name in the model, notes and problems."""
    real, wrappers = {}, {}
    for name in names:
        real[name], wrappers[name] = _without_words(name)
    problems = list(_half_wrapped(real, wrappers))
    wrapped = [name for name in real if wrappers[name]]
    words = dict.fromkeys(word for name in wrapped for chain in wrappers[name].values() for word in chain.split("."))
    notes = [_note(words, wrapped)] if wrapped else []
    for _ in range(MOST_FRONTS):
        if not (front := _front(real.values())):
            break
        inside = [name for name in real if real[name].startswith(front)]
        if outside := next((name for name in real if not real[name].startswith(front)), None):
            problems.append(_half(outside, inside[0], front[:-1]))
        notes.append(_note([front[:-1]], inside))
        real |= {name: real[name].removeprefix(front) for name in inside}
    if _is_base(real.values()):
        notes.append("the names lack 'model.': the model was saved without its head, and is read with it")
        real = {name: there if there.startswith("lm_head.") else f"model.{there}" for name, there in real.items()}
    # transformers writes the vision tower below `model.`; the published files do not
    prefixed = {name: there for name, there in real.items() if there.startswith("model.vision_model.")}
    return real | {name: there.removeprefix("model.") for name, there in prefixed.items()}, notes, problems


def _front(names: Collection[str]) -> str:
    """What stands before the names of the model; whatever it is, the embeddings show it."""
    for front, signs in FRONTS.items():
        if any(name.startswith(signs) for name in names):
            return front
    embeddings = next((name for name in names if name.endswith(tuple(f".{end}" for end in EMBEDDINGS))), "")
    return next((embeddings.removesuffix(end) for end in EMBEDDINGS if embeddings.endswith(f".{end}")), "")


def _is_base(names: Collection[str]) -> bool:
    """Are these the names of a PT model that was saved without its head?"""
    return (
        any(name in BASE for name in names)
        and any(".q_proj." in name for name in names)
        and not any(name.startswith(ROOTS) for name in names)
    )


def _without_words(name: str) -> tuple[str, dict[str, str]]:
    """The name without words that wrap, and where they stood: path of the module -> words."""
    parts = name.split(".")
    if WORDS.isdisjoint(parts) or len(parts) > MOST_PARTS:
        return name, {}
    kept: list[str] = []
    places: dict[str, str] = {}
    for part in parts:
        if part in WORDS:
            place = "".join(f"{p}." for p in kept)
            places[place] = f"{places[place]}.{part}" if place in places else part
        else:
            kept.append(part)
    return ".".join(kept), places


def _half_wrapped(real: Mapping[str, str], wrappers: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Modules of whose tensors some are wrapped, or otherwise; each is named once."""
    first: dict[str, str] = {}  # path of a wrapped module -> a name in it
    for name, places in wrappers.items():
        for place in places:
            first.setdefault(place, name)
    told = set()
    for name, there in real.items() if first else ():
        places = wrappers[name]
        paths = ["", *(there[: m.end()] for m in itertools.islice(re.finditer(r"\.", there), MOST_PARTS))]
        for place in paths:
            if place in first and place not in told and places.get(place) != wrappers[first[place]][place]:
                told.add(place)
                yield _half(name, first[place], wrappers[first[place]][place])


def _half(outside: str, inside: str, words: str) -> str:
    return f"{outside}: stands beside {inside:.200}: '{words}.' must wrap all tensors of a module or none; name them alike"


def _note(words: Iterable[str], names: Sequence[str]) -> str:
    said = ", ".join(f"'{word}.'" for word in words)
    return f"left out of the names of {_number(names)}, such as {names[0]:.200}: {said:.200}, around the model or parts of it"


def _number(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
