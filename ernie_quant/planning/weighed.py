"""What must be known of several weights at once: those that a program keeps in one layer, and that have a scale in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ernie_quant.codecs import LARGEST_WEIGHT, Codec
from ernie_quant.planning.choose import Choice
from ernie_quant.runtimes import Runtime
from ernie_quant.views.kinds import Decoded, View
from ernie_quant.views.largest import Largest


def weighed(chosen: Sequence[Choice], target: Runtime) -> dict[str, Mapping[str, View]]:
    """Weight -> statistic -> the view of it, of the weights whose codec makes a scale of the largest of its layer."""
    together: dict[tuple[str, Codec], list[Choice]] = defaultdict(list)
    for choice in chosen:
        if LARGEST_WEIGHT in choice.codec.needs:
            together[target.one_scale(choice.weight.name), choice.codec].append(choice)
    found: dict[str, Mapping[str, View]] = {}
    for members in together.values():
        view = Decoded(Largest(tuple(member.weight.view for member in members)))
        found |= {member.weight.name: {LARGEST_WEIGHT: view} for member in members}
    return found
