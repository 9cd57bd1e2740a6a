"""Is a quantized weight that no report speaks of one that its codec makes of the source?

Its codes may have been chosen by anyone, so they need not be those that this program would choose. The measure is the nearest
codes at the stored scales, in blocks of 64 weights. Rounding leaves no block that is farther from the source; calibration moves
codes everywhere, and each a little. Refused are

- a row that has lost everything: its error is no better than that of zeros, and it holds a fair share of the weight;
- few blocks that are farther, while all others are as near as can be: RARE ones with a clear one among them, or below a half
  with a gross one;
- where codes are not the nearest, a relative error above LIMITS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Codec, CodesAnother
from ernie_quant.measure import Difference, compare, squares
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View
from ernie_quant.views.read import read
from ernie_quant.weights.stored import Stored

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

BLOCK = 64  # weights of a row, or fewer where 64 does not divide it; WINT2 shuffles inputs within as many
RARE, HALF = 100, 2  # one of so many blocks
# how much farther, in errors of the nearest codes of the block and of its row: a sixteenth is a third of a step of one code,
# which a tie does not explain; three is what no code next to the nearest costs
CLEAR, GROSS = 1 / 16, 3
FAIR = 1000  # a row of less than a thousandth of the mean energy may vanish: blocks of fp8 share a scale
LIMITS = ((3, 0.5), (6, 0.25), (math.inf, 0.05))  # below so many bits per weight, such a relative error; rounding stays far below
ELEMENTS = 1 << 20  # at a time, in float64


@dataclass(frozen=True)
class Judgement:
    """Sums over a weight, or over slabs of it."""

    difference: Difference = field(default_factory=Difference)
    blocks: int = 0
    far: int = 0  # blocks that are farther from the source than the nearest codes at their scales
    clear: int = 0  # of these: too far for a tie
    gross: int = 0  # of these: too far for a neighbour
    lost: tuple[int, ...] = ()  # rows

    def __add__(self, other: Judgement) -> Judgement:
        return Judgement(
            self.difference + other.difference, self.blocks + other.blocks, self.far + other.far, self.clear + other.clear,
            self.gross + other.gross, self.lost + other.lost,
        )  # fmt: skip

    @property
    def changed(self) -> bool:
        """Are few blocks farther than all others?"""
        return (self.clear > 0 and RARE * self.far < self.blocks) or (self.gross > 0 and HALF * self.far < self.blocks)


def judge(entry: Stored, view: View, files: Files, originals: Files) -> Judgement:
    """The whole weight, a slab at a time. Raises CheckpointError."""
    judged = Judgement()
    for rows in entry.slabs():
        original, encoded = read(view, originals, rows), entry.encoded(files, rows)
        judged += judge_slab(entry.name, entry.codec, original, encoded, rows[0])
    return judged


def judge_slab(name: str, codec: Codec, original: torch.Tensor, encoded: Encoded, first: int = 0) -> Judgement:
    """Rows of a weight from `first` on: the source's, and what is stored. Raises CheckpointError."""
    import torch

    judged = Judgement(compare(name, original, codec.decode(encoded)))
    if isinstance(codec, CodesAnother):
        codec, original, encoded = codec.plain(original, encoded)
    result, nearest = codec.decode(encoded), codec.decode(codec.recode(original, encoded))
    step = max(1, ELEMENTS // original.shape[1])
    mean = squares(original, result).total / len(original)
    for start in range(0, len(original), step):
        x, there, best = (t[start : start + step].double() for t in (original, result, nearest))
        nearest_error = _blocks((x - best).square())
        excess = _blocks((x - there).square()) - nearest_error
        usual = torch.maximum(nearest_error, nearest_error.mean(1, keepdim=True))
        far = ~(excess <= 0)  # NaN is far
        energy = x.square().sum(1)
        lost = ~((x - there).square().sum(1) < energy) & (energy > 0) & (energy >= mean / FAIR)
        rows = tuple(first + start + int(row) for row in lost.nonzero())
        clear, gross = (int((far & ~(excess <= times * usual)).sum()) for times in (CLEAR, GROSS))
        judged += Judgement(blocks=far.numel(), far=int(far.sum()), clear=clear, gross=gross, lost=rows)
    return judged


def _blocks(elements: torch.Tensor) -> torch.Tensor:
    """Sums over blocks: [rows, in] -> [rows, blocks]."""
    return elements.reshape(len(elements), -1, _block(elements.shape[1])).sum(2)


def problem(name: str, codec: Codec, spec: TensorSpec, judged: Judgement) -> str:
    """Why this cannot be what the codec made of the source; empty if it can."""
    error, (out, width) = judged.difference.rel_error, spec.shape
    limit = next(limit for bits, limit in LIMITS if codec.bits_per_weight(spec) < bits)
    if judged.far and not error <= limit:
        return f"{name}: its relative error to the source is {error:.3g}; {codec.form} stays below {limit:g}"
    if judged.lost:
        rows = ", ".join(map(str, judged.lost[:5])) + (", …" if len(judged.lost) > 5 else "")
        return f"{name}: {len(judged.lost)} of {out} rows ({rows}) are no nearer to the source than zeros"
    if judged.changed:
        return (
            f"{name}: in {judged.far} of {judged.blocks} blocks of {_block(width)} weights the codes are not the nearest to the"
            " source at their scales, in all others they are; these were changed"
        )
    return ""


def _block(width: int) -> int:
    return math.gcd(width, BLOCK)
