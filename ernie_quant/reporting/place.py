"""What the name of a tensor says about its place in the model: layer, expert, projection."""

from __future__ import annotations

import re
from dataclasses import dataclass

ID = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")


@dataclass(frozen=True)
class Place:
    """What the name of a tensor says: `parts` with `ids` between them, which of the ids is what, and the projection."""

    parts: tuple[str, ...]
    ids: tuple[int, ...]
    layer: int | None  # index in `ids`
    expert: int | None
    block: str  # what the layer belongs to: "layer", "MTP"
    projection: str

    @staticmethod
    def of(name: str) -> Place:
        """Take a name apart."""
        pieces = ID.split(name)
        parts, ids = tuple(pieces[::2]), tuple(map(int, pieces[1::2]))
        before = {part.rpartition(".")[0].rpartition(".")[2]: i for i, part in enumerate(parts[:-1])}
        layer = next((before[word] for word in ("layers", "mtp_block") if word in before), None)
        end = parts[-1].removesuffix(".weight").strip(".")
        block = "MTP" if "layers" not in before else "layer"
        return Place(parts, ids, layer, before.get("experts"), block, end or name)
