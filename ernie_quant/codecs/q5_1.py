"""Q5_1: 5 bits, a scale and a minimum per 32 weights: 6 bits per weight.

It stands in for Q5_K in rows that 256 does not divide.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q51(Blocks):
    """Rows of blocks of ggml's Q5_1."""

    dtype = "Q5_1"
    rate = 59.0


CODEC = Q51
EXAMPLES = (Q51(),)
