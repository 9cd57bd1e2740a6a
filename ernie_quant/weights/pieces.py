"""Rows of quantized weights that a view joins: what may be taken over as it is stored, without decoding it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.devices import CPU
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Cat, Cut, Decoded, View
from ernie_quant.weights.stored import Stored

if TYPE_CHECKING:
    from ernie_quant.codecs import Encoded


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` of a quantized weight [out, in]."""

    stored: Stored
    first: int
    last: int

    def cut(self, start: int, stop: int) -> Piece:
        """Some of its rows, counted from its first."""
        return Piece(self.stored, self.first + start, min(self.first + stop, self.last))

    @property
    def whole_bytes(self) -> bool:
        """Can these rows be unpacked by themselves?"""
        by = self.stored.target.ROWS
        return self.first % by == 0 and (self.last % by == 0 or self.last == self.stored.shape[0])


def pieces_of(view: View) -> tuple[Piece, ...]:
    """What of which weights the rows of a view are, in order; nothing where any of it is no decoded row."""
    match view:
        case Decoded(Stored() as stored):
            return (Piece(stored, 0, stored.shape[0]),)
        case Cut(base, 0, start, stop):
            return between(pieces_of(base), start, stop)
        case Cat(parts, 0):
            found = [pieces_of(part) for part in parts]
            return tuple(piece for some in found for piece in some) if all(found) else ()
    return ()


def encoded_of(pieces: Sequence[Piece], files: Files, device: str = CPU) -> Encoded:
    """The codec's fields of their rows, one below the other."""
    import torch

    fields = [piece.stored.encoded(files, (piece.first, piece.last), device) for piece in pieces]
    return fields[0] if len(fields) == 1 else {name: torch.cat([some[name] for some in fields]) for name in fields[0]}


def between(pieces: tuple[Piece, ...], start: int, stop: int) -> tuple[Piece, ...]:
    """Rows `start` to `stop` of the pieces together."""
    found, at = [], 0
    for piece in pieces:
        size = piece.last - piece.first
        first, last = max(start - at, 0), min(stop - at, size)
        if first < last:
            found.append(piece.cut(first, last))
        at += size
    return tuple(found)
