"""Paddle <-> PT as a table: every stored tensor matches exactly one rule, and every shape follows from the dimensions.

The PT form is the canonical one: a linear's weight is [out, in], one tensor per projection. A stored tensor becomes PT
tensors by its rule's `Op`, and is made of them by the inverse; which tensors a file stores, a layout says.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from ernie_quant.views import build
from ernie_quant.views.kinds import View

# roles
EXPERT, VISION_EXPERT, SHARED = "experts", "vision_experts", "shared_experts"
ATTENTION, MLP, ROUTER, NORM = "attention", "mlp", "router", "norms"
EMBED, HEAD, MTP, VISION, RESAMPLER = "embeddings", "head", "mtp", "vision_tower", "resampler"
ROLES = (EXPERT, VISION_EXPERT, SHARED, MLP, ATTENTION, ROUTER, NORM, EMBED, HEAD, MTP, VISION, RESAMPLER)

EXPERT_ROLES = (EXPERT, VISION_EXPERT)  # routed ones

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
        view = build.transpose(stored) if self.transpose else stored
        if not self.split:
            return [view]
        blocks = dims[self.groups] // ranks if self.groups else 1
        sizes = [size_of(s, dims) // ranks // blocks for s in self.split]
        pieces: list[list[View]] = [[] for _ in sizes]
        at = 0
        for _ in range(blocks):
            for piece, size in zip(pieces, sizes, strict=True):
                piece.append(build.cut(view, 0, at, at + size))
                at += size
        return [build.cat(piece, 0) for piece in pieces]

    def inverse(self, pieces: Sequence[View]) -> View:
        """The Paddle view of PT tensors."""
        assert not self.groups, "the interleaved layout is only read"
        view = build.cat(list(pieces), 0) if self.split else pieces[0]
        return build.transpose(view) if self.transpose else view

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


VOCABULARY = (EMBED, HEAD)  # a row per token


def is_layer(name: str, role: str, shape: tuple[int, ...], *, vocabulary: bool = False) -> bool:
    """Is it a matrix that a runtime's configuration speaks of? All but norms, second routers, and embeddings and head
    unless it can quantize the `vocabulary`."""
    return len(shape) == 2 and role != NORM and (vocabulary or role not in VOCABULARY) and name.endswith(".weight")


@dataclass(frozen=True)
class Row:
    """A rule for one combination of ids: real names, real shapes."""

    rule: Rule
    paddle: str
    pt: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the PT tensors
    place: tuple[int, int] = (0, 1)  # (i, n): number i of the n that its last id numbers

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
        return tuple(dict.fromkeys(ref.name for ref in build.refs(self.view)))


MOST_MISSING = 10  # rows per stored tensor, above which config.json is not believed and not expanded


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


def starred(name: str) -> str:
    """The name of an expert's weight, for that of any expert."""
    return re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", name)


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
            ids = rule.ids
            last = len(self.ids[ids[-1]]) if ids else 1
            for number, numbers in enumerate(itertools.product(*(self.ids[i] for i in ids))):
                values = dict(zip(ids, numbers, strict=True))
                pt = tuple(p.format(**values) for p in rule.pt)
                yield Row(rule, rule.paddle.format(**values), pt, shapes, (number % last, last))

    @property
    def size(self) -> int:
        """How many rows there are."""
        return sum(math.prod(len(self.ids[i]) for i in rule.ids) for rule in self.rules)

    def size_problem(self, stored: int) -> str:
        """Why the table is not expanded for a checkpoint of `stored` tensors; empty if it may be."""
        if self.size <= MOST_MISSING * (stored + 1000):
            return ""
        return f"config.json promises about {self.size} tensors, the files hold {stored}; is it the config of another model?"
