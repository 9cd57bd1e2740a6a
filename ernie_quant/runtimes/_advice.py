"""What a user of vLLM should know of a form before it is made: on which GPUs it is fast, and what reports do not count."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.codecs.mxfp4 import Float4Group
from ernie_quant.codecs.nvfp4 import NvFloat4
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.codecs.w4a4 import NvFloat4Inputs
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

# read in 0.33 (oracle/nvfp4.py, compressed_tensors_w4a4_nvfp4.py); the error: tests/test_nvfp4.py
NVFP4 = (
    "nvfp4 without --activations fp4 gains nothing: vLLM decodes the weights. wint4 --group-size 32 has as many bits (4.5) and"
    " the same error, and loads in transformers too"
)
NVFP4_INPUTS = (
    "nvfp4 with fp4 inputs is for Blackwell; other GPUs decode the weights and leave the inputs as they are. The errors here are"
    " of the weights alone; eval rounds the inputs too"
)


def notes(linears: Sequence[Linear]) -> list[str]:
    """Widths that load, but for which vLLM's fast kernels are not made."""
    marlin = [li for li in linears if isinstance(li.codec, RoundToNearest | Float4Group | NvFloat4)]
    narrow = {li.spec.shape[1] for li in marlin if li.ranks != IN and li.spec.shape[1] % 128}
    notes = [f"vLLM's Marlin kernels want hidden_size to be a multiple of 128, this one's is {n}" for n in sorted(narrow)]
    kinds: set[type] = {type(li.codec) for li in linears}
    forms = {Float4Group: FLOAT4, NvFloat4Inputs: NVFP4_INPUTS, ConvolutionalCode: WINT2}
    said = [note for form, note in forms.items() if form in kinds]
    said += [NVFP4] if NvFloat4 in kinds and NvFloat4Inputs not in kinds else []
    return notes + w4afp8.notes(linears) + said
