"""Q4_K: 4 bits in blocks of 256 with a scale and a minimum per 32 weights: 4.5 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q4K(Blocks):
    """Rows of blocks of ggml's Q4_K."""

    dtype = "Q4_K"
    rate = 32.0


CODEC = Q4K
EXAMPLES = (Q4K(),)
