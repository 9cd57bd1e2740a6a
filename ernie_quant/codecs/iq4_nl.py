"""IQ4_NL: 4 bits that number 16 unevenly spaced values, and a scale per 32 weights: 4.5 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class IQ4NL(Blocks):
    """Rows of blocks of ggml's IQ4_NL."""

    dtype = "IQ4_NL"
    rate = 92.0


CODEC = IQ4NL
EXAMPLES = (IQ4NL(),)
