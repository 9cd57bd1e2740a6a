"""Q5_0: 5 bits from -16 to 15 and a scale per 32 weights: 5.5 bits per weight.

It stands in for Q4_K in rows that 256 does not divide.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q50(Blocks):
    """Rows of blocks of ggml's Q5_0."""

    dtype = "Q5_0"
    rate = 75.0


CODEC = Q50
EXAMPLES = (Q50(),)
