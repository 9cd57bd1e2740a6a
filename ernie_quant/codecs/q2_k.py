"""Q2_K: 2 bits in blocks of 256 with a scale and a minimum per 16 weights: 2.625 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q2K(Blocks):
    """Rows of blocks of ggml's Q2_K."""

    dtype = "Q2_K"
    rate = 27.0


CODEC = Q2K
EXAMPLES = (Q2K(),)
