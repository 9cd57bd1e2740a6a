"""Q5_K: 5 bits in blocks of 256 with a scale and a minimum per 32 weights: 5.5 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q5K(Blocks):
    """Rows of blocks of ggml's Q5_K."""

    dtype = "Q5_K"
    rate = 31.0


CODEC = Q5K
EXAMPLES = (Q5K(),)
