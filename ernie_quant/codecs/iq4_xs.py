"""IQ4_XS: 4 bits that number 16 unevenly spaced values, in blocks of 256 with a scale per 32: 4.25 bits per weight."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_quant.codecs._ggml import Blocks


@dataclass(frozen=True)
class IQ4XS(Blocks):
    """Rows of blocks of ggml's IQ4_XS."""

    dtype = "IQ4_XS"
    rate = 69.0


CODEC = IQ4XS
EXAMPLES = (IQ4XS(),)
