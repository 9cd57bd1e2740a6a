"""Paddle <-> PT as a table: every stored tensor matches exactly one rule, and every shape follows from the dimensions.

The PT form is the canonical one: a linear's weight is [out, in], one tensor per projection. A layout is read by
taking each stored tensor through its rule's `Op` into PT views, and written by the inverse. So Paddle -> Paddle,
PT -> Paddle, merged ranks and the third layout are all the same two steps.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter

from ernie_quant import views
from ernie_quant.checkpoint import Checkpoint, TensorRef
from ernie_quant.lazy import View

# roles
EXPERT, VISION_EXPERT, SHARED = "experts", "vision_experts", "shared_experts"
ATTENTION, MLP, ROUTER, NORM = "attention", "mlp", "router", "norms"
EMBED, HEAD, MTP, VISION, RESAMPLER = "embeddings", "head", "mtp", "vision_tower", "resampler"
ROLES = (EXPERT, VISION_EXPERT, SHARED, MLP, ATTENTION, ROUTER, NORM, EMBED, HEAD, MTP, VISION, RESAMPLER)

Dims = Mapping[str, int]
Symbols = tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """How a Paddle tensor becomes one or several PT tensors: transpose, then split along the first axis.

    `split` names the dimension of each piece. With `groups` (a dimension) the pieces are interleaved: the tensor
    holds that many blocks one after the other, each with its share of every piece.
    """

    transpose: bool = False
    split: Symbols = ()
    groups: str = ""

    def apply(self, stored: View, dims: Dims, ranks: int = 1) -> list[View]:
        """PT views of a stored Paddle tensor (of one of `ranks` tensor-parallel ranks)."""
        view = views.transpose(stored) if self.transpose else stored
        if not self.split:
            return [view]
        blocks = dims[self.groups] // ranks if self.groups else 1
        sizes = [size_of(s, dims) // ranks // blocks for s in self.split]
        pieces: list[list[View]] = [[] for _ in sizes]
        at = 0
        for _ in range(blocks):
            for piece, size in zip(pieces, sizes, strict=True):
                piece.append(views.cut(view, 0, at, at + size))
                at += size
        return [views.cat(piece, 0) for piece in pieces]

    def inverse(self, pieces: Sequence[View]) -> View:
        """The Paddle view of PT tensors."""
        assert not self.groups, "the interleaved layout is only read"
        view = views.cat(list(pieces), 0) if self.split else pieces[0]
        return views.transpose(view) if self.transpose else view

    def stored_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the Paddle tensor, from the shapes of its PT tensors."""
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        return shape[::-1] if self.transpose else shape


COPY, TRANSPOSE = Op(), Op(transpose=True)
# along which axis of the PT tensor ranks share it
OUT, IN = 0, 1


@dataclass(frozen=True)
class Rule:
    """One line of the table. `{id}` in a name runs over the ids of the architecture.

    `shape` is that of the PT tensors: one tuple of symbols, or one per PT tensor where they differ.
    `need` says when the tensor must be there: "always", "never" (it may be there), or a flag of the architecture.
    """

    paddle: str
    op: Op
    pt: tuple[str, ...]
    shape: Symbols | tuple[Symbols, ...]
    role: str
    ranks: int | None = None
    need: str = "always"

    @property
    def shapes(self) -> tuple[Symbols, ...]:
        """Symbols of each PT tensor's shape."""
        if self.shape and isinstance(self.shape[0], str):
            return (self.shape,) * len(self.pt)
        return self.shape  # type: ignore[return-value]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids in the Paddle name, in order."""
        return tuple(field for _, field, _, _ in Formatter().parse(self.paddle) if field)

    @property
    def linear(self) -> bool:
        """Is it the weight matrix of a linear layer?"""
        return self.role in QUANTIZABLE and all(len(s) == 2 for s in self.shapes) and self.pt[0].endswith("proj.weight")


# never: router, norms, embeddings, head, vision tower, resampler
QUANTIZABLE = frozenset({EXPERT, VISION_EXPERT, SHARED, MLP, ATTENTION, MTP})


def is_layer(name: str, role: str, shape: tuple[int, ...]) -> bool:
    """Is it a matrix that a runtime's configuration speaks of? All but embeddings, norms, head and second routers."""
    return len(shape) == 2 and role not in (EMBED, NORM, HEAD) and name.endswith(".weight")


@dataclass(frozen=True)
class Row:
    """A rule for one combination of ids: real names, real shapes."""

    rule: Rule
    paddle: str
    pt: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the PT tensors

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the Paddle tensor."""
        return self.rule.op.stored_shape(self.shapes)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model in canonical form: its PT name, the view that yields it, and what it is."""

    name: str
    view: View
    row: Row

    @property
    def role(self) -> str:
        """What it is, one of `ROLES`."""
        return self.row.rule.role

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the stored tensors it comes from."""
        return tuple(dict.fromkeys(ref.name for ref in views.refs(self.view)))


MOST_MISSING = 10  # rows per stored tensor, above which config.json is not believed and not expanded
PADDLE, PT, PADDLEFORMERS = "paddle", "pt", "paddleformers"


def layout_of(names: Iterator[str] | Sequence[str]) -> str:
    """Paddle, PT or the third layout; only names tell (config keys have misled others)."""
    plain = False
    for name in names:
        if name.startswith("ernie."):
            return PADDLE
        if name.startswith("model.") and ".qkv_proj." in name:
            plain = True
    return PADDLEFORMERS if plain else PT


def size_of(symbol: str, dims: Dims) -> int:
    """The number behind a symbol: a key of `dims`, a digit, or a multiple of a key such as `2H`."""
    if symbol in dims:
        return dims[symbol]
    times, rest = re.fullmatch(r"(\d+)(\w*)", symbol).groups()  # type: ignore[union-attr]
    return int(times) * (dims[rest] if rest else 1)


def natural(name: str) -> list[str | int]:
    """A sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def folded(name: str) -> str:
    """A name with its numbers replaced, to group the tensors of all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@dataclass(frozen=True)
class NameMap:
    """The table for one checkpoint: rules, ids (name -> numbers), dimensions and flags."""

    rules: tuple[Rule, ...]
    ids: Mapping[str, Sequence[int]]
    dims: Dims
    flags: frozenset[str] = frozenset()

    def rows(self) -> Iterator[Row]:
        """Every rule for every combination of its ids."""
        for rule in self.rules:
            shapes = tuple(tuple(size_of(s, self.dims) for s in shape) for shape in rule.shapes)
            for numbers in itertools.product(*(self.ids[i] for i in rule.ids)):
                values = dict(zip(rule.ids, numbers, strict=True))
                yield Row(rule, rule.paddle.format(**values), tuple(p.format(**values) for p in rule.pt), shapes)

    @property
    def size(self) -> int:
        """How many rows there are."""
        return sum(math.prod(len(self.ids[i]) for i in rule.ids) for rule in self.rules)

    def disbelieved(self, stored: int) -> str:
        """Why the table is not expanded for a checkpoint of `stored` tensors; empty if it may be."""
        if self.size <= MOST_MISSING * (stored + 1000):
            return ""
        return f"config.json promises about {self.size} tensors, the files hold {stored}; is it the config of another model?"

    def resolve(self, checkpoint: Checkpoint, fixes: frozenset[str] = frozenset()) -> tuple[list[Weight], list[str]]:
        """All tensors in canonical form, in natural order of their PT names, and every disagreement found."""
        layout = layout_of(list(checkpoint.refs))
        if problem := self.disbelieved(len(checkpoint.refs)):
            return [], [problem]
        reader = _Reader(self, layout, [dict(_aliased(rank.refs)) for rank in checkpoint.ranks], fixes)
        weights = [weight for row in self.rows() for weight in reader.weights(row)]
        reader.report_unknown()
        return sorted(weights, key=lambda w: natural(w.name)), reader.problems

    def write(self, weights: Sequence[Weight], layout: str) -> list[Weight]:
        """The same tensors under the names of `layout`, in natural order."""
        if layout == PT:
            return list(weights)
        by_row: dict[str, list[Weight]] = {}
        for weight in weights:
            by_row.setdefault(weight.row.paddle, []).append(weight)
        joined = []
        for name, group in by_row.items():
            row = group[0].row
            pieces = {w.name: w.view for w in group}
            joined.append(Weight(name, row.rule.op.inverse([pieces[p] for p in row.pt]), row))
        return sorted(joined, key=lambda w: natural(w.name))


def _aliased(refs: Mapping[str, TensorRef]) -> Iterator[tuple[str, TensorRef]]:
    """transformers writes the vision tower below `model.`; the published files do not."""
    for name, ref in refs.items():
        yield (name.removeprefix("model.") if name.startswith("model.vision_model.") else name), ref


class _Reader:
    """Takes stored tensors through the table, and remembers what was used and what disagreed."""

    def __init__(self, table: NameMap, layout: str, ranks: list[dict[str, TensorRef]], fixes: frozenset[str]) -> None:
        self.table, self.layout, self.ranks, self.fixes = table, layout, ranks, fixes
        self.used: set[str] = set()
        self.problems: list[str] = []

    def weights(self, row: Row) -> list[Weight]:
        """The canonical tensors of one row; empty where something is missing or misshapen."""
        if self.layout == PT:
            found = [self.merged(row, name, COPY, [name], [shape]) for name, shape in zip(row.pt, row.shapes, strict=True)]
        else:
            op = row.rule.op
            if self.layout == PADDLEFORMERS and "KV" in op.split:
                op = replace(op, groups="kv_heads")
            name = row.paddle
            if self.layout == PADDLEFORMERS:
                name = re.sub(r"^ernie\.", "model.", name)
            found = [self.merged(row, name, op, list(row.pt), list(row.shapes))]
        return [weight for group in found for weight in group]

    def merged(self, row: Row, name: str, op: Op, pt: list[str], shapes: list[tuple[int, ...]]) -> list[Weight]:
        """One stored tensor of every rank, as PT tensors."""
        axis = row.rule.ranks
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
            stored = self.checked(row, refs[name], op, shapes, shares)
            if stored is None:
                return []
            pieces.append(op.apply(stored, self.table.dims, shares))
        copies = [[rank[i] for rank in pieces] for i in range(len(pt))]
        joined = [views.same(c) if axis is None else views.cat(c, axis) for c in copies]
        return [Weight(p, view, row) for p, view in zip(pt, joined, strict=True)]

    def checked(self, row: Row, ref: TensorRef, op: Op, shapes: list[tuple[int, ...]], ranks: int) -> View | None:
        """The stored tensor, if its shape follows from the dimensions."""
        if ranks > 1:
            axis = row.rule.ranks or 0
            if any(shape[axis] % ranks for shape in shapes):
                self.problems.append(f"{ref.name}: {shapes[0]} cannot have been shared by {ranks} ranks")
                return None
            shapes = [(*s[:axis], s[axis] // ranks, *s[axis + 1 :]) for s in shapes]
        expected, shape = op.stored_shape(shapes), ref.spec.shape
        if shape == expected:
            return views.leaf(ref)
        fix = next((f for f in FIXES if f in ref.name), None)
        if fix and shape == expected[::-1]:
            if fix in self.fixes:
                return views.transpose(views.leaf(ref))
            self.problems.append(f"{ref.name}: {_versus(row, op, ref, expected)}: stored untransposed; --fix {fix} repairs it")
            return None
        each = f" in each of {ranks} ranks" if ranks > 1 else ""
        self.problems.append(f"{ref.name}: {_versus(row, op, ref, expected)}{each}")
        return None

    def report_unknown(self) -> None:
        """Every stored tensor that no rule names."""
        for refs in self.ranks:
            for name in sorted(set(refs) - self.used, key=natural):
                where = f", {'x'.join(map(str, refs[name].spec.shape))}, in {refs[name].file.name}"
                self.problems.append(f"{name}: is unknown to this architecture{where}")


# names that published files are known to hold transposed, and that --fix repairs
FIXES = ("mtp_linear_proj",)


def _versus(row: Row, op: Op, ref: TensorRef, expected: tuple[int, ...]) -> str:
    """`(1024, 512) is not H x 2H = (512, 1024)`."""
    wanted = row.rule.shapes
    symbols = wanted[row.pt.index(ref.name)] if ref.name in row.pt else wanted[0]
    if op.split:
        symbols = ("+".join(s[0] for s in wanted), *wanted[0][1:])
    if op.transpose:
        symbols = symbols[::-1]
    return f"{ref.spec.shape} is not {' x '.join(symbols)} = {expected}"
