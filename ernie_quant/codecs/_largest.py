"""The statistics that scales of a whole weight are made of: the largest number that must fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ernie_quant.codecs import LARGEST_WEIGHT
from ernie_quant.errors import ErnieQuantError

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

LARGEST = "largest"  # the largest |what the kernel rounds| of the inputs of a weight that is not cut off, f32 [1]
WORDS = {LARGEST: "the largest input", LARGEST_WEIGHT: "the largest weight"}


def magnitude(statistics: Encoded, name: str, codec: str, makes: str) -> torch.Tensor:
    """f32 [1], finite and >= 0. Raises ErnieQuantError; `makes`: what is made of it."""
    if name not in statistics:
        raise ErnieQuantError(f"{codec}: {WORDS[name]} is not among the statistics: {makes} is made of it")
    found = statistics[name].detach().float().reshape(-1)
    if len(found) != 1 or not 0 <= float(found) < float("inf"):
        raise ErnieQuantError(f"{codec}: {WORDS[name]} is {found.tolist()}, not one finite number")
    return found
