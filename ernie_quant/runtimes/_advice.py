"""What a user of vLLM should know of a form before it is made: on which GPUs it is fast, and what reports do not count."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.names import IN
from ernie_quant.runtimes import Linear
from ernie_quant.runtimes import _w4afp8 as w4afp8

# read in 0.33 (compressed_tensors_moe_w4a4_mxfp4.py), of the experts; the error: tests/test_mxfp4.py
FLOAT4 = (
    "mxfp4 is for Blackwell, where vLLM computes experts with inputs in float4 too; other GPUs decode the weights. At the same"
    " 4.25 bits wint4 --group-size 64 has a third less error"
)
WINT2 = (
    "vLLM and transformers know WINT2 by ernie-quant alone, which must be installed beside them; without it transformers"
    " warns and goes on with random experts"
)


def notes(linears: Sequence[Linear]) -> list[str]:
    """Widths that load, but for which vLLM's fast kernels are not made."""
    marlin = [li for li in linears if isinstance(li.codec, RoundToNearest | Float4Group)]
    narrow = {li.spec.shape[1] for li in marlin if li.ranks != IN and li.spec.shape[1] % 128}
    notes = [f"vLLM's Marlin kernels want hidden_size to be a multiple of 128, this one's is {n}" for n in sorted(narrow)]
    forms = {Float4Group: FLOAT4, ConvolutionalCode: WINT2}
    said = [note for form, note in forms.items() if any(isinstance(li.codec, form) for li in linears)]
    return notes + w4afp8.notes(linears) + said
