"""A checkpoint against its architecture's table: every stored tensor in canonical form, and what disagrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ernie_quant import archs
from ernie_quant.archs import Arch
from ernie_quant.checkpoint import Checkpoint, TensorRef
from ernie_quant.names import NameMap, Op, Row, Weight, natural
from ernie_quant.views import build
from ernie_quant.views.kinds import View
from ernie_quant.weights import claims
from ernie_quant.weights.layouts import Layout, StoredTensor, layout_of

# names that published files are known to hold transposed, and that --fix repairs
FIXES = ("mtp_linear_proj",)


@dataclass(frozen=True)
class Resolved:
    """A checkpoint with its architecture: names resolved to canonical tensors, and what disagreed."""

    arch: Arch
    config: dict[str, Any]  # flat
    map: NameMap
    weights: list[Weight]
    problems: list[str]


def resolve(checkpoint: Checkpoint, fixes: frozenset[str] = frozenset()) -> Resolved:
    """Names and shapes of a checkpoint against its architecture's table. Raises ConfigError."""
    arch = archs.find(checkpoint.config)
    config = arch.flat(checkpoint.config)
    if claims.leftover(checkpoint):
        config = {key: value for key, value in config.items() if key not in claims.CLAIMS}
    name_map = arch.name_map(config, list(checkpoint.refs))
    weights, problems = canonical(checkpoint, name_map, fixes)
    problems = [*checkpoint.anomalies, *problems]
    return Resolved(arch, config, name_map, weights, problems + (list(checkpoint.others) if problems else []))


def canonical(checkpoint: Checkpoint, table: NameMap, fixes: frozenset[str]) -> tuple[list[Weight], list[str]]:
    """All tensors in canonical form, in natural order of their PT names, and every disagreement found."""
    layout = layout_of(checkpoint.refs)
    if problem := table.size_problem(len(checkpoint.refs)) or layout.problem(table.dims):
        return [], [problem]
    reader = _Reader(table, layout, [dict(_aliased(rank.refs)) for rank in checkpoint.ranks], fixes)
    weights = [weight for row in table.rows() for weight in reader.weights(row)]
    # a name that nobody knows says more than thousands that are missing
    return sorted(weights, key=lambda w: natural(w.name)), [*reader.unknown(), *reader.problems]


def _aliased(refs: Mapping[str, TensorRef]) -> Iterator[tuple[str, TensorRef]]:
    """transformers writes the vision tower below `model.`; the published files do not."""
    for name, ref in refs.items():
        yield (name.removeprefix("model.") if name.startswith("model.vision_model.") else name), ref


class _Reader:
    """Takes stored tensors through the table, and remembers what was used and what disagreed."""

    def __init__(self, table: NameMap, layout: Layout, ranks: list[dict[str, TensorRef]], fixes: frozenset[str]) -> None:
        self.table, self.layout, self.ranks, self.fixes = table, layout, ranks, fixes
        self.used: set[str] = set()
        self.problems: list[str] = []

    def weights(self, row: Row) -> list[Weight]:
        """The canonical tensors of one row; empty where something is missing or misshapen."""
        return [weight for stored in self.layout.stored(row) for weight in self.merged(row, stored)]

    def merged(self, row: Row, stored: StoredTensor) -> list[Weight]:
        """One stored tensor of every rank, as PT tensors."""
        name, axis = stored.name, row.rule.ranks
        shares = len(self.ranks) if axis is not None else 1  # the others have it whole
        self.used.add(name)
        absent = [i for i, refs in enumerate(self.ranks) if name not in refs]
        if absent:
            if row.rule.need in ("always", *self.table.flags) or len(absent) < len(self.ranks):
                where = f" in rank {', '.join(map(str, absent))}" if len(self.ranks) > 1 else ""
                self.problems.append(f"{name}: is missing{where}")
            return []
        pieces: list[list[View]] = []
        for refs in self.ranks:
            view = self.checked(row, refs[name], stored, shares)
            if view is None:
                return []
            pieces.append(stored.op.apply(view, self.table.dims, shares))
        copies = [[rank[i] for rank in pieces] for i in range(len(stored.pt))]
        joined = [build.replicated(c) if axis is None else build.cat(c, axis) for c in copies]
        return [Weight(p, view, row) for p, view in zip(stored.pt, joined, strict=True)]

    def checked(self, row: Row, ref: TensorRef, stored: StoredTensor, ranks: int) -> View | None:
        """The stored tensor, if its shape follows from the dimensions."""
        shapes = stored.shapes
        if ranks > 1:
            axis = row.rule.ranks or 0
            if any(shape[axis] % ranks for shape in shapes):
                self.problems.append(f"{ref.name}: {shapes[0]} cannot have been shared by {ranks} ranks")
                return None
            shapes = tuple((*s[:axis], s[axis] // ranks, *s[axis + 1 :]) for s in shapes)
        expected, shape = stored.op.stored_shape(shapes), ref.spec.shape
        if shape == expected:
            return build.leaf(ref)
        versus = _versus(row, stored.op, ref, expected)
        fix = next((f for f in FIXES if f in ref.name), None)
        if fix and shape == expected[::-1]:
            if fix in self.fixes:
                return build.transpose(build.leaf(ref))
            self.problems.append(f"{ref.name}: {versus}: stored untransposed; --fix {fix} repairs it")
            return None
        each = f" in each of {ranks} ranks" if ranks > 1 else ""
        self.problems.append(f"{ref.name}: {versus}{each}")
        return None

    def unknown(self) -> Iterator[str]:
        """Every stored tensor that no rule names."""
        for refs in self.ranks:
            for name in sorted(set(refs) - self.used, key=natural):
                where = f", {'x'.join(map(str, refs[name].spec.shape))}, in {refs[name].file.name}"
                yield f"{name}: is unknown to this architecture{where}"


def _versus(row: Row, op: Op, ref: TensorRef, expected: tuple[int, ...]) -> str:
    """`(1024, 512) is not H x 2H = (512, 1024)`."""
    wanted = row.rule.shapes
    symbols = wanted[row.pt.index(ref.name)] if ref.name in row.pt else wanted[0]
    if op.split:
        symbols = ("+".join(s[0] for s in wanted), *wanted[0][1:])
    if op.transpose:
        symbols = symbols[::-1]
    return f"{ref.spec.shape} is not {' x '.join(symbols)} = {expected}"
