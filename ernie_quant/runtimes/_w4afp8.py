"""W4AFP8 in vLLM: int4 weights in groups of 128, inputs in float8. Only Hopper has the kernels.

vllm-project/vllm (compressed_tensors_moe_w4a8_fp8.py, compressed_tensors_w4a8_fp8.py, kernels/linear/mixed_precision/cutlass.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from ernie_quant.codecs.w4afp8 import Weight4Float8
from ernie_quant.names import EXPERT_ROLES
from ernie_quant.runtimes import Linear

EXPERT_TILE, TILE = 256, 128  # of inputs and outputs: of an expert of a rank, and of other linears
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
NOTE = (
    "int4 for fp8 inputs runs in vLLM on Hopper only (sm90: H100, H200, H20), which also rounds the scales of weights to float8;"
    " the errors here are without that, and without the rounding of inputs"
)


def tile(linear: Linear) -> int:
    """What sizes must be multiples of."""
    return EXPERT_TILE if linear.role in EXPERT_ROLES else TILE


def problems(linears: Sequence[Linear]) -> list[str]:
    """Widths that its kernels do not take; those that are no groups the codec says."""
    return [
        f"{li.name}: {li.spec.shape[0]} outputs and {li.spec.shape[1]} inputs are not multiples of {tile(li)}, which"
        " vLLM's kernels for fp8 inputs want; without --activations fp8 they need not be"
        for li in held(linears)
        if li.codec.problem(li.spec) is None and any(size % tile(li) for size in li.spec.shape)
    ]


def notes(linears: Sequence[Linear]) -> list[str]:
    """What it runs on, and what is lost beside the errors of a report."""
    return [NOTE] if held(linears) else []


def held(linears: Sequence[Linear]) -> list[Linear]:
    """Those that are stored so."""
    return [li for li in linears if isinstance(li.codec, Weight4Float8)]
