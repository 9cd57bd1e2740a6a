"""Q3_K: 3 bits in blocks of 256 with a scale per 16 weights: 3.4375 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q3K(Blocks):
    """Rows of blocks of ggml's Q3_K."""

    dtype = "Q3_K"
    rate = 60.0


CODEC = Q3K
EXAMPLES = (Q3K(),)
