"""Q8_0: 8 bits and a scale per 32 weights: 8.5 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class Q80(Blocks):
    """Rows of blocks of ggml's Q8_0."""

    dtype = "Q8_0"
    rate = 207.0
    adopts = 8


CODEC = Q80
EXAMPLES = (Q80(),)
