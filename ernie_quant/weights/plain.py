"""A checkpoint against its architecture's table: every stored tensor in canonical form, and what disagrees."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ernie_quant import archs
from ernie_quant.archs import Arch, _labels, _rope
from ernie_quant.checkpoint import Checkpoint, TensorRef, TensorSpec
from ernie_quant.names import ROUTER, NameMap, Row, Weight, natural
from ernie_quant.views import build
from ernie_quant.views.kinds import View
from ernie_quant.weights import claims, in_memory
from ernie_quant.weights.layouts import Layout, StoredTensor, layout_of
from ernie_quant.weights.wrapped import unwrapped

# names that published files are known to hold transposed, and that --fix repairs
FIXES = ("mtp_linear_proj",)
ALONE = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Resolved:
    """A checkpoint with its architecture: names resolved to canonical tensors, and what disagreed."""

    arch: Arch
    config: dict[str, Any]  # flat
    map: NameMap
    weights: list[Weight]
    problems: list[str]
    layout: Layout
    notes: tuple[str, ...] = ()  # what was taken, left out or guessed


def resolve(checkpoint: Checkpoint, fixes: frozenset[str] = frozenset()) -> Resolved:
    """Names and shapes of a checkpoint against its architecture's table. Raises ConfigError."""
    tensors = unwrapped([rank.refs for rank in checkpoint.ranks])
    names, layout = list(tensors.ranks[0]), layout_of(tensors.ranks[0])
    config, label = _labels.as_it_is(checkpoint.config, names)
    arch = archs.find(config)
    config = arch.flat(config)
    if claims.leftover(checkpoint):
        config = {key: value for key, value in config.items() if key not in claims.CLAIMS}
    name_map = arch.name_map(config, names)
    problems, notes = [*checkpoint.anomalies, *tensors.problems], [*tensors.notes, *label]
    if not layout.out_first and (unread := _rope.unread_by_paddle(config)):
        problems.append(unread)
    if problem := name_map.size_problem(len(names)) or layout.problem(name_map.dims):
        return Resolved(arch, config, name_map, [], [*problems, problem, *checkpoint.others], layout, tuple(notes))
    reader = _Reader(name_map, layout, tensors.ranks, fixes)
    weights = sorted((w for row in name_map.rows() for w in reader.weights(row)), key=lambda w: natural(w.name))
    # a name that nobody knows says more than thousands that are missing
    problems += [*dict.fromkeys(reader.unknown()), *reader.found]
    notes += [*reader.notes(), *_router_notes(weights)]
    return Resolved(
        arch, config, name_map, weights, problems + (list(checkpoint.others) if problems else []), layout, tuple(notes)
    )


def _router_notes(weights: Sequence[Weight]) -> list[str]:
    """Routers that somebody has rounded: kept, for what is lost is lost."""
    narrow = [w for w in weights if w.role == ROUTER and w.view.dtype != "F32"]
    if not narrow:
        return []
    return [
        f"{narrow[0].sources[0]}: is {narrow[0].view.dtype}, the releases have F32 ({len(narrow)} such routers and biases);"
        " kept as it is"
    ]


class _Reader:
    """Takes stored tensors through the table, and remembers what was used and what disagreed."""

    def __init__(self, table: NameMap, layout: Layout, ranks: Sequence[Mapping[str, TensorRef]], fixes: frozenset[str]) -> None:
        self.table, self.layout, self.ranks, self.fixes = table, layout, ranks, fixes
        self.used: set[str] = set()
        self.flat: list[str] = []  # routing biases without their first axis
        self.found: dict[str, None] = {}  # problems in order, each once though a tensor holds many experts

    def notes(self) -> list[str]:
        """What was read otherwise than it is stored."""
        more = f" ({len(self.flat)} such tensors)" if len(self.flat) > 1 else ""
        return [f"{self.flat[0]}: its one row is stored without a first axis{more}"] if self.flat else []

    def weights(self, row: Row) -> list[Weight]:
        """The canonical tensors of one row; empty where something is missing or misshapen."""
        return [weight for stored in self.layout.stored(row) for weight in self.merged(row, stored)]

    def merged(self, row: Row, stored: StoredTensor) -> list[Weight]:
        """One stored tensor of every rank (or several, joined), as PT tensors."""
        axis = row.rule.ranks
        shares = len(self.ranks) if axis is not None else 1  # the others have it whole
        pieces: list[list[View]] = []
        names = (stored.name, *stored.others)
        if not all([self.there(name, row) for name in names]):  # noqa: C419 - all of them are used
            return []
        for refs in self.ranks:
            views = [view for name in names if (view := self.checked(row, refs[name], stored, shares)) is not None]
            if len(views) < len(names):
                return []
            pieces.append(stored.op.apply(build.cat(views, 0) if stored.others else views[0], self.table.dims, shares))
        copies = [[rank[i] for rank in pieces] for i in range(len(stored.pt))]
        whole = [build.replicated(c) if axis is None else build.cat(c, axis) for c in copies]
        return [Weight(p, view, row) for p, view in zip(stored.pt, whole, strict=True)]

    def there(self, name: str, row: Row) -> bool:
        """Has every rank the tensor?"""
        self.used.add(name)
        absent = [i for i, refs in enumerate(self.ranks) if name not in refs]
        if absent and (row.rule.need in ("always", *self.table.flags) or len(absent) < len(self.ranks)):
            where = f" in rank {', '.join(map(str, absent))}" if len(self.ranks) > 1 else ""
            self.found[f"{name}: is missing{where}"] = None
        return not absent

    def checked(self, row: Row, ref: TensorRef, stored: StoredTensor, ranks: int) -> View | None:
        """The stored tensor (of a stack, the one that is meant), if its shape follows from the dimensions."""
        shapes = stored.shapes
        if ranks > 1:
            axis = row.rule.ranks or 0
            if any(shape[axis] % ranks for shape in shapes):
                self.found[f"{ref.name}: {shapes[0]} cannot have been shared by {ranks} ranks"] = None
                return None
            stored = replace(stored, shapes=tuple((*s[:axis], s[axis] // ranks, *s[axis + 1 :]) for s in shapes))
        expected, shape = stored.shape, ref.spec.shape
        if shape == expected:
            return build.leaf(ref) if stored.place is None else build.pick(build.leaf(ref), stored.place[0])
        if row.rule.role == ROUTER and expected == (1, *shape):  # as Baidu's auto-parallel trainer saves the bias
            self.flat.append(ref.name)
            return build.leaf(replace(ref, spec=TensorSpec(expected, ref.spec.dtype)))
        versus = _versus(row, stored, ref, expected)
        fix = next((f for f in FIXES if f in ref.name), None)
        if fix and shape == expected[::-1]:
            if fix in self.fixes:
                return build.transpose(build.leaf(ref))
            self.found[f"{ref.name}: {versus}: stored untransposed; --fix {fix} repairs it"] = None
            return None
        each = f" in each of {ranks} ranks" if ranks > 1 else ""
        self.found[f"{ref.name}: {versus}{each}"] = None
        return None

    def unknown(self) -> Iterator[str]:
        """Every stored tensor that no rule names."""
        for refs in self.ranks:
            unknown = sorted(set(refs) - self.used, key=natural)
            alone = {name: None for name in unknown if self.layout.held is not None and ALONE.search(name)}
            if alone:
                yield self.two_forms(refs, list(alone))
            for ref in (refs[name] for name in unknown if name not in alone):
                where = f", {'x'.join(map(str, ref.spec.shape))}, in {ref.file.name}"
                yield f"{ref.name}: is unknown to this architecture{where}"

    def two_forms(self, refs: Mapping[str, TensorRef], alone: Sequence[str]) -> str:
        """Experts that stand alone where others are in one tensor."""
        stacked = min((refs[name].name for name in self.used & refs.keys() if in_memory.is_stack(name)), default="another tensor")
        return (
            f"{refs[alone[0]].name}: is one expert's, and {stacked} holds those of a whole layer; a checkpoint has one form or"
            f" the other ({len(alone)} such tensor{'s' if len(alone) > 1 else ''})"
        )


def _versus(row: Row, stored: StoredTensor, ref: TensorRef, expected: tuple[int, ...]) -> str:
    """`(1024, 512) is not H x 2H = (512, 1024)`."""
    wanted = row.rule.shapes
    symbols = wanted[row.pt.index(stored.pt[0])] if len(stored.pt) == 1 else wanted[0]
    if stored.op.split:
        symbols = ("+".join(s[0] for s in wanted), *wanted[0][1:])
    if stored.op.transpose:
        symbols = symbols[::-1]
    if stored.others:
        symbols = (str(expected[0]), *symbols[1:])
    if stored.place is not None:
        symbols = ("E", *symbols)
    return f"{ref.spec.shape} is not {' x '.join(symbols)} = {expected}"
