"""Q4_0: 4 bits from -8 to 7 and a scale per 32 weights: 4.5 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q40(Blocks):
    """Rows of blocks of ggml's Q4_0."""

    dtype = "Q4_0"
    rate = 110.0
    adopts = 4


CODEC = Q40
EXAMPLES = (Q40(),)
