"""A quantized checkpoint in the layout of another runtime, without loss: every weight keeps its codes and scales.

Names, joints and packing change; where the other runtime has no such form, its own `problems` say so.
"""

from __future__ import annotations

from dataclasses import replace

from ernie_quant import plugins, runtimes
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import KEEP
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import ConfigError, PlanError
from ernie_quant.names import Weight
from ernie_quant.runtimes import Runtime
from ernie_quant.views import build
from ernie_quant.weights.claims import evidence
from ernie_quant.weights.layouts import LAYOUTS
from ernie_quant.weights.pieces import Piece, pieces_of
from ernie_quant.weights.stored import runtime_of

NOTE = "codes and scales are those of the source, to the bit; what these lose of the original weights, its own report says"

REFUSED = "is quantized in forms that {program} does not load; quantize the original for it, or dequantize --to {layout}"


def moves(source: Checkpoint, target: Runtime) -> bool:
    """Is it quantized, for a known runtime of another layout but the same file format? Raises PlanError for the same layout."""
    mine = _known(source) if evidence(source) else None
    if mine is None or mine.FORMAT != target.FORMAT:
        return False
    if mine.LAYOUT == target.LAYOUT:
        name, title = plugins.name_of(mine, runtimes), LAYOUTS[mine.LAYOUT].title
        more = "; reshard changes its ranks" if mine.PER_RANK else ""
        raise PlanError(f"{source.folder}: is quantized for {name} already, in {title} layout{more}", [])
    return True


def _known(source: Checkpoint) -> Runtime | None:
    """The runtime whose files these are; None for those of a stranger."""
    try:
        return runtime_of(source)
    except (ConfigError, PlanError):
        return None


def codec_of(weight: Weight, target: Runtime) -> Codec:
    """The codec whose codes a weight of the result can take over; what has none is kept.

    Raises PlanError for parts of one weight that are stored in several forms.
    """
    pieces = pieces_of(weight.view if LAYOUTS[target.LAYOUT].out_first else build.transpose(weight.view))
    if not pieces:
        return KEEP
    first, forms = pieces[0].stored, {piece.stored.codec.form: piece.stored for piece in pieces}
    if len(forms) > 1:
        said = ", ".join(f"{stored.name} is {form}" for form, stored in forms.items())
        raise PlanError(f"{weight.name}: is made of weights that are stored in several forms: {said}", [])
    if odd := next((piece for piece in pieces if not piece.whole_bytes), None):
        raise PlanError(f"{weight.name}: rows {odd.first} to {odd.last} of {odd.stored.name} cannot be unpacked alone", [])
    codec = first.codec
    if isinstance(codec, RoundToNearest) and codec.group_size == CHANNEL and target.PER_RANK:
        return replace(codec, full_range=False)  # whether the lowest code is there is seen when it is read
    return codec


def fits(codec: Codec, pieces: tuple[Piece, ...]) -> bool:
    """Are these the codes of this codec, whatever way it would choose them?"""
    return bool(pieces) and all(
        type(piece.stored.codec) is type(codec) and _form(piece.stored.codec) == _form(codec) for piece in pieces
    )


def _form(codec: Codec) -> str:
    return replace(codec, full_range=True).form if isinstance(codec, RoundToNearest) else codec.form
