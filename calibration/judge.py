"""What the heads of one or two models make of the same tokens, without any logits [tokens, vocabulary] in memory.

A slab of the vocabulary is read at a time, of both models the same rows, and every sum over the vocabulary is kept as
(largest logit m, sum of exp(logit - m)). With p of the reference and q of the other, both as logits,

    KL = sum exp(p - m_p) (p - q) / S_p - log Z_p + log Z_q,   log Z = m + log S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.calibration.forward import last_norm
from ernie_quant.calibration.model import HEAD, Model

from ernie_quant.threads import ordered

if TYPE_CHECKING:
    import torch

SLAB_BYTES = 64 << 20  # of a head in float32
LOGITS = 1 << 22  # of a slab and a chunk of tokens
CACHED = 64, 4096  # tokens and rows of the head whose logits stay in a cache


@dataclass(frozen=True)
class Judged:
    """Of every token, float64 [tokens] each: nats of the next one by the reference and by the other model, KL, same best?"""

    nll: torch.Tensor
    nll_other: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    same: torch.Tensor | None = None


class _Logits:
    """What is remembered of one model's logits: `m` and `s` [tokens] of the sum, the target's, and the best one's number."""

    def __init__(self, model: Model, tokens: torch.Tensor) -> None:
        import torch

        self.model, self.seen = model, last_norm(model, tokens)
        count = len(tokens)
        self.m = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.s, self.target = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        self.best = torch.zeros(count, dtype=torch.int64)

    def slab(self, first: int, last: int) -> torch.Tensor:
        """Rows of the head, [rows, H]."""
        return self.model.rows(self.model.head, first, last)

    def logits(self, rows: slice, head: torch.Tensor, first: int) -> torch.Tensor:
        """float64 [tokens, rows of the head]."""
        bias = f"{HEAD}.bias"
        found = self.seen[rows] @ head.T
        if bias in self.model.weights:
            found += self.model.rows(bias, first, first + len(head))
        return found.double()

    def add(self, rows: slice, logits: torch.Tensor, first: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a slab in; exp(logits - m), and what sums of the slabs before are to be multiplied by."""
        value, at = logits.max(1)
        before, better = self.m[rows], value > self.m[rows]
        self.best[rows] = at.where(better, self.best[rows] - first) + first
        now = value.maximum(before)
        shrink, terms = (before - now).exp(), (logits - now[:, None]).exp()
        self.m[rows], self.s[rows] = now, self.s[rows] * shrink + terms.sum(1)
        inside = (targets >= first) & (targets < first + logits.shape[1])
        picked = logits.gather(1, (targets - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target[rows] = picked.where(inside, self.target[rows])
        return terms, shrink

    @property
    def log_z(self) -> torch.Tensor:
        """Logarithm of the sum over the vocabulary."""
        return self.m + self.s.log()


def judge(
    model: Model, hidden: torch.Tensor, targets: torch.Tensor, other: tuple[Model, torch.Tensor] | None = None
) -> Judged:  # fmt: skip
    """Residuals [tokens, H] after the last layer, and the ids [tokens] that follow; `other`: a model and its residuals."""
    import torch

    vocabulary, width = model.geometry.vocab_size, model.geometry.hidden_size
    mine = _Logits(model, hidden)
    theirs = None if other is None else _Logits(*other)
    mean = torch.zeros(len(hidden), dtype=torch.float64)  # sum of exp(p - m_p) (p - q)
    step = max(1, SLAB_BYTES // (4 * width))
    for first in range(0, vocabulary, step):
        last = min(first + step, vocabulary)
        heads = [side.slab(first, last) for side in (mine, theirs) if side is not None]
        for rows in _chunks(len(hidden), last - first):
            p = mine.logits(rows, heads[0], first)
            terms, shrink = mine.add(rows, p, first, targets[rows])
            if theirs is not None:
                q = theirs.logits(rows, heads[1], first)
                theirs.add(rows, q, first, targets[rows])
                mean[rows] = mean[rows] * shrink + (terms * (p - q)).sum(1)
    if theirs is None:
        return Judged(mine.log_z - mine.target)
    kl = mean / mine.s - mine.log_z + theirs.log_z
    return Judged(mine.log_z - mine.target, theirs.log_z - theirs.target, kl, (mine.best == theirs.best).double())


def _chunks(tokens: int, rows: int) -> list[slice]:
    step = max(1, LOGITS // rows)
    return [slice(first, first + step) for first in range(0, tokens, step)]


def divergences(
    model: Model, hidden: torch.Tensor, others: Sequence[tuple[Model, torch.Tensor]], workers: int
) -> list[float]:  # fmt: skip
    """Mean KL(model || other), in nats per token, of residuals [tokens, H] after the last layer of many others at once.

    In float32 but for the sums, and in pieces that stay in a processor's cache: there may be hundreds of others.
    """
    vocabulary, width = model.geometry.vocab_size, model.geometry.hidden_size
    mine, theirs = _Sum(model, hidden, True), [_Sum(*other, other[0] is model) for other in others]
    step = max(1, SLAB_BYTES // max(4 * width, 8 * len(hidden)))
    for first in range(0, vocabulary, step):
        last = min(first + step, vocabulary)
        piece = _Piece(mine, mine.head(first, last), (first, last), [])
        piece.remember()
        list(ordered(piece.add_to, theirs, workers))
    return [float((other.mean / mine.s - mine.log_z + other.log_z).mean()) for other in theirs]


class _Sum:
    """Of one model: `m` and `s` [tokens] of the sum over the vocabulary, `mean` the sum of exp(p - m_p) (p - q)."""

    def __init__(self, model: Model, tokens: torch.Tensor, same_head: bool) -> None:
        import torch

        self.model, self.seen, self.same_head = model, last_norm(model, tokens), same_head
        self.m = torch.full((len(tokens),), -torch.inf)
        self.s, self.mean = (torch.zeros(len(tokens), dtype=torch.float64) for _ in range(2))

    def head(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the head, and of its bias."""
        bias = f"{HEAD}.bias"
        rows = self.model.rows(self.model.head, first, last)
        return rows, self.model.rows(bias, first, last) if bias in self.model.weights else None

    def logits(self, tokens: slice, head: tuple[torch.Tensor, torch.Tensor | None], rows: slice) -> torch.Tensor:
        """f32 [tokens, rows of the head]."""
        found = self.seen[tokens] @ head[0][rows].T
        return found if head[1] is None else found + head[1][rows]

    def add(self, tokens: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a piece in; exp(logits - m), and what sums of the pieces before are to be multiplied by."""
        now = logits.amax(1).maximum(self.m[tokens])
        shrink, terms = (self.m[tokens] - now).exp().double(), (logits - now[:, None]).exp_()
        self.m[tokens], self.s[tokens] = now, self.s[tokens] * shrink + terms.sum(1)
        return terms, shrink

    @property
    def log_z(self) -> torch.Tensor:
        """Logarithm of the sum over the vocabulary."""
        return self.m.double() + self.s.log()


@dataclass(frozen=True)
class _Piece:
    """Rows of the head, and what the reference makes of them."""

    mine: _Sum
    head: tuple[torch.Tensor, torch.Tensor | None]
    span: tuple[int, int]
    known: list[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor]]  # tokens, rows, logits, terms, shrink

    def remember(self) -> None:
        """Of the reference, for all others."""
        for tokens in _slices(len(self.mine.seen), CACHED[0]):
            for rows in _slices(self.span[1] - self.span[0], CACHED[1]):
                logits = self.mine.logits(tokens, self.head, rows)
                self.known.append((tokens, rows, logits, *self.mine.add(tokens, logits)))

    def add_to(self, other: _Sum) -> None:
        """The sums of another model."""
        import torch

        head = self.head if other.same_head else other.head(*self.span)
        for tokens, rows, p, terms, shrink in self.known:
            q = other.logits(tokens, head, rows)
            other.add(tokens, q)
            said = torch.bmm(terms[:, None], (p - q)[:, :, None])[:, 0, 0]
            other.mean[tokens] = other.mean[tokens] * shrink + said


def _slices(count: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]
