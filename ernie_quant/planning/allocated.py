"""An allocation as a recipe that people read: TOML rules, each with what it costs, and a head that says why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ernie_quant import codecs
from ernie_quant.codecs import Codec
from ernie_quant.names import EMBED, HEAD
from ernie_quant.planning.allocate import Allocation, Costs
from ernie_quant.planning.calibration import AUTO, Asked
from ernie_quant.planning.recipe import LAYER
from ernie_quant.planning.units import Units
from ernie_quant.reporting.numbers import in_runs

OUTSIDE = {"model.embed_tokens": EMBED, "lm_head": HEAD}
OF_CALIBRATION = ("method", "damping", "passes")  # options of codecs that [calibration] sets


@dataclass(frozen=True)
class Group:
    """Weights that have one codec in the same layers: names without their numbers (`mlp.experts.*.up_proj`)."""

    codec: Codec
    tails: tuple[str, ...]
    layers: tuple[int, ...]
    nbytes: int  # 0 for those that had no choice
    kl: float

    @property
    def name(self) -> str:
        """`mlp.experts.*.{gate,up}_proj, mlp.down_proj`."""
        ends = _by_module(self.tails).items()
        return ", ".join(f"{module}.{names[0] if len(names) == 1 else _braced(names)}" for module, names in ends)


def groups_of(units: Units, chosen: Allocation, costs: Costs) -> list[Group]:
    """All that is quantized, in the order of layers."""
    sums: dict[tuple[Codec, int, tuple[str, ...]], tuple[int, float]] = {}
    for unit, cost, index in zip(units.free, costs, chosen.chosen, strict=True):
        option = unit.options[index]
        if not option.kept:
            sums[option.codec, unit.layer, tuple(sorted({_tail(name) for name in unit.weights}))] = (option.nbytes, cost[index])
    for name, codec in units.fixed:
        found = LAYER.search(name)
        sums.setdefault((codec, int(found[1]) if found else -1, (_tail(name),)), (0, 0.0))
    by_tails: dict[tuple[Codec, tuple[str, ...]], dict[int, tuple[int, float]]] = {}
    for (codec, layer, tails), of in sums.items():
        by_tails.setdefault((codec, tails), {})[layer] = of
    alike: dict[tuple[Codec, tuple[int, ...]], list[tuple[tuple[str, ...], int, float]]] = {}
    for (codec, tails), layers in by_tails.items():
        nbytes, kl = (sum(of[i] for of in layers.values()) for i in (0, 1))
        alike.setdefault((codec, tuple(sorted(layers))), []).append((tails, int(nbytes), float(kl)))
    return [
        Group(codec, tuple(sorted({tail for tails, _, _ in same for tail in tails})), layers,
              sum(nbytes for _, nbytes, _ in same), sum(kl for _, _, kl in same))
        for (codec, layers), same in alike.items()
    ]  # fmt: skip


def _tail(name: str) -> str:
    """`model.layers.3.mlp.experts.7.up_proj.weight` -> `mlp.experts.*.up_proj`."""
    inside = re.sub(r"^.*\.layers\.\d+\.", "", name.removesuffix(".weight"))
    return re.sub(r"experts\.\d+\.", "experts.*.", inside)


def text(head: Sequence[str], runtime: str, groups: Sequence[Group], asked: Asked | None, beside: Path) -> str:
    """The file; `head` are its first comments. Texts inside of the folder `beside` are named as seen from there."""
    lines = [*(f"# {line}".rstrip() for line in head), "", f"runtime = {json.dumps(runtime)}"]
    for group in groups:
        lines += ["", *_rule(group)]
    if asked is not None:
        lines += ["", *_calibration(asked, beside)]
    return "\n".join(lines) + "\n"


def _rule(group: Group) -> Iterator[str]:
    where = f"layer{'s' if len(group.layers) > 1 else ''} {in_runs(group.layers)}: " if group.layers[0] >= 0 else ""
    of = f", {group.nbytes / 1e9:.3f} GB, predicted {group.kl:.2g} nats" if group.nbytes else ", as the program wants it"
    yield f"# {where}{group.name}: {group.codec.form}{of}"
    yield "[[rule]]"
    if group.tails[0] in OUTSIDE:
        yield f"role = {json.dumps(OUTSIDE[group.tails[0]])}"
    else:
        yield f"match = '{pattern(group.layers, group.tails)}'"
    yield f"codec = {json.dumps(codecs.name_of(group.codec))}"
    yield from (f"{key} = {json.dumps(value)}" for key, value in settings(group.codec).items())


def _by_module(tails: Sequence[str]) -> dict[str, list[str]]:
    """`mlp.experts.*` -> [`gate_proj`, `up_proj`]."""
    found: dict[str, list[str]] = {}
    for tail in tails:
        module, _, name = tail.rpartition(".")
        found.setdefault(module, []).append(name)
    return found


def _braced(names: Sequence[str]) -> str:
    return f"{{{','.join(name.removesuffix('_proj') for name in names)}}}_proj"


def pattern(layers: Sequence[int], tails: Sequence[str]) -> str:
    """A regular expression for PT names."""
    inside = []
    for module, names in _by_module(tails).items():
        ends = names[0] if len(names) == 1 else f"(?:{'|'.join(name.removesuffix('_proj') for name in names)})_proj"
        inside.append(re.escape(f"{module}.").replace(r"\*", r"\d+") + ends)
    which = inside[0] if len(inside) == 1 else f"(?:{'|'.join(inside)})"
    numbers = str(layers[0]) if len(layers) == 1 else f"(?:{'|'.join(map(str, layers))})"
    where = rf"\.layers\.{numbers}\." if layers[0] >= 0 else "^"
    return rf"{where}{which}\.weight"


def settings(codec: Codec) -> Mapping[str, Any]:
    """Options that are not the usual ones, and those that say most of it."""
    given = {f.name: (getattr(codec, f.name), f.default) for f in fields(codec)}  # type: ignore[arg-type]
    return {
        key: value
        for key, (value, usual) in given.items()
        if key not in OF_CALIBRATION and (value != usual or key in ("bits", "group_size"))
    }


def _calibration(asked: Asked, beside: Path) -> Iterator[str]:
    yield "[calibration]"
    files = asked.text if isinstance(asked.text, tuple) else ()
    yield f"text = {json.dumps([_seen(file, beside) for file in files]) if files else json.dumps(AUTO)}"
    yield f"tokens = {asked.tokens}"
    yield f"seed = {asked.seed}"
    yield f"method = {json.dumps(asked.method)}"
    yield f"fit = {json.dumps(asked.fit)}"


def _seen(file: Path, beside: Path) -> str:
    path = os.path.relpath(file.absolute(), beside.absolute())
    return str(file.absolute()) if path.startswith("..") else path
