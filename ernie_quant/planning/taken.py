"""Rows that need not be encoded: calibration has made them, or a quantized source has the same codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ernie_quant.codecs import Codec
from ernie_quant.codecs._ggml import Blocks
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import CheckpointError
from ernie_quant.planning import as_stored
from ernie_quant.planning.steps import Step
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View
from ernie_quant.weights.pieces import Piece, between, encoded_of, pieces_of

if TYPE_CHECKING:
    from ernie_quant.codecs import Encoded


def given(step: Step, files: Files, rows: tuple[int, int], device: str) -> Encoded | None:
    """The codec's fields for rows of a step's weight, if they are there. Raises CheckpointError."""
    if step.made is not None:
        return step.made.stored.encoded(files, rows, device)
    found = between(taken_over(step.view, step.codec), *rows)
    if not found:
        return None
    encoded = encoded_of(found, files, device)
    if isinstance(step.codec, Blocks):
        return step.codec.adopted(found[0].stored.codec, encoded)
    _check(step, encoded)
    return encoded


def moved(step: Step) -> bool:
    """Has a step's weight the codes and scales of the source, whatever its layout?"""
    return not isinstance(step.codec, Blocks) and bool(taken_over(step.view, step.codec))


def taken_over(view: View, codec: Codec) -> tuple[Piece, ...]:
    """The rows of quantized weights of the source whose codes `codec` may hold as they are; nothing if it may not."""
    found = pieces_of(view)
    if isinstance(codec, Blocks):
        alike = all(isinstance(p.stored.codec, RoundToNearest) and p.stored.codec.bits == codec.adopts for p in found)
        return found if len(found) == 1 and alike and found[0].whole_bytes else ()
    return found if as_stored.fits(codec, found) else ()


def _check(step: Step, encoded: Encoded) -> None:
    """A code that the form of the result does not have."""
    codec = step.codec
    if not isinstance(codec, RoundToNearest) or codec.full_range or not encoded["codes"].numel():
        return
    lowest, least = int(encoded["codes"].min()), 1 - 2 ** (codec.bits - 1)
    if lowest < least:
        raise CheckpointError(
            f"{step.name}: holds the code {lowest}, {codec.form} begins with {least}; quantize the original for this runtime"
        )
