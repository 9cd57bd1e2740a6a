"""Q6_K: 6 bits in blocks of 256 with a scale per 16 weights: 6.5625 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q6K(Blocks):
    """Rows of blocks of ggml's Q6_K."""

    dtype = "Q6_K"
    rate = 60.0


CODEC = Q6K
EXAMPLES = (Q6K(),)
