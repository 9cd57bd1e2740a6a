"""Rows that need not be encoded: calibration has made them, or a quantized source has the same codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ernie_quant.codecs import Codec
from ernie_quant.codecs._ggml import Blocks
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.planning.steps import Step
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Cut, Decoded, View
from ernie_quant.weights.stored import Stored

if TYPE_CHECKING:
    from ernie_quant.codecs import Encoded


def given(step: Step, files: Files, rows: tuple[int, int], device: str) -> Encoded | None:
    """The codec's fields for rows of a step's weight, if they are there."""
    if step.made is not None:
        return step.made.stored.encoded(files, rows, device)
    if not isinstance(step.codec, Blocks) or (found := taken_over(step.view, step.codec)) is None:
        return None
    stored, first = found
    return step.codec.adopted(stored.codec, stored.encoded(files, (rows[0] + first, rows[1] + first), device))


def taken_over(view: View, codec: Codec) -> tuple[Stored, int] | None:
    """The quantized weight of the source whose codes `codec` may hold as they are, and the row of it that `view` begins with."""
    first = 0
    if isinstance(view, Cut) and view.axis == 0:
        first, view = view.start, view.base
    if not (isinstance(view, Decoded) and isinstance(view.source, Stored) and isinstance(codec, Blocks)):
        return None
    stored = view.source
    like = isinstance(stored.codec, RoundToNearest) and stored.codec.bits == codec.adopts
    return (stored, first) if like and first % stored.target.ROWS == 0 else None
