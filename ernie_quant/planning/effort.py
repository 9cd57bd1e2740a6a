"""How long a form takes to be made, from the rates of its codecs: an order of magnitude, for machines differ."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_quant.codecs.keep import Keep
from ernie_quant.planning.choose import Choice

COPIED = 0.35e9  # bytes a second and core that are read, hashed and written, on an Intel Xeon with AVX-512


def core_hours(chosen: Sequence[Choice], counts: Sequence[int]) -> float | None:
    """Hours of one core; None where a codec does not say how fast it is."""
    seconds = 0.0
    for choice, count in zip(chosen, counts, strict=True):
        seconds += choice.spec.nbytes * count / COPIED
        if isinstance(choice.codec, Keep):
            continue
        if not choice.codec.rate:
            return None
        seconds += choice.spec.numel * count / (choice.codec.rate * 1e6)
    return seconds / 3600
