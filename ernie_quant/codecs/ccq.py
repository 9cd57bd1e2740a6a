"""WINT2: convolutional code quantization (CCQ), the 2-bit form of FastDeploy's experts.

w ~ value(code, code_scale, code_zp) * local_scale * super_scale; a byte codes 4 weights, a group of 64 inputs has an integer
local scale from 0 to 15, an output channel the other three. Formulas and search: kernels/ccq_reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Measured, _feedback

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded, Encoder
    from ernie_quant.kernels.ccq_feedback import Prepared

GROUP = 64
IN_MULTIPLE, OUT_MULTIPLE = 128, 8  # what FastDeploy's kernel takes: two local scales to a byte, tiles of 8 channels
EFFORTS = (1, 4, 16)

# (code_scale, code_zp), found by benchmarks/search_ccq_pairs.py among 141312 and in its greedy order, so that any first n
# are a good list of n. The comments say the relative error that the first n reach on 192 Gaussian and 192 Student-t
# (5 degrees) rows of 2048 that they were not searched on, with group scales that are not rounded. Multiples of 1/256 and
# whole code_zp make byte * code_scale + code_zp + 0.5 exact in float32, fused or not.
# fmt: off
CANDIDATES = (
    (120.9609375, 1120.0),   # .1038 .1547
    (120.9453125, 1044.0),   # .1028 .1534
    (120.96875, 1185.0),     # .1022 .1528
    (120.9375, 734.0),       # .1019 .1523
    (120.9453125, 1144.0),   # .1016 .1521
    (120.9375, 1136.0),      # .1014 .1518
    (120.94140625, 1299.0),  # .1013 .1517
    (120.97265625, 737.0),   # .1012 .1516
    (119.96875, 1106.0),     # .1011 .1516
    (120.9453125, 1234.0),   # .1011 .1514
    (120.97265625, 1270.0),  # .1010 .1513
    (120.94921875, 1196.0),  # .1010 .1512
    (120.9375, 795.0),       # .1009 .1511
    (120.984375, 837.0),     # .1008 .1510
    (120.92578125, 1186.0),  # .1008 .1510
    (120.9453125, 754.0),    # .1008 .1510
)
# fmt: on


@dataclass(frozen=True)
class ConvolutionalCode(Measured):
    """`effort`: how many pairs of code_scale and code_zp are tried per output channel, 1, 4 or 16.

    `method`, `damping` and `passes` say what is done with statistics of the inputs (codecs/_feedback.py), with the first pair
    alone; without them the bytes nearest to the weight are taken.
    """

    effort: int = 16
    method: str = _feedback.NEAREST
    damping: float = _feedback.DAMPING
    passes: int = _feedback.PASSES
    rows = 1
    rate = 30.0
    decodes_to = "BF16"
    version = 2
    form = "wint2 (CCQ)"

    def __post_init__(self) -> None:
        if type(self.effort) is not int or self.effort not in EFFORTS:
            raise ValueError(f"effort is {self.effort!r}, not {', '.join(map(str, EFFORTS[:-1]))} or {EFFORTS[-1]}")
        _feedback.check(self.method, self.damping, self.passes)

    def describe(self) -> str:
        """For people."""
        effort = "" if self.effort == EFFORTS[-1] else f", effort {self.effort}"
        return self.form + effort + _feedback.describe(self.method, self.damping, self.passes)

    def problem(self, spec: TensorSpec) -> str | None:
        """FastDeploy's kernel takes multiples of 128 inputs and of 8 outputs."""
        out, width = spec.shape
        wanted = [
            f"{n} {kind} are not a multiple of {m}" + (f", {' or '.join(map(str, _near(n, m)))} would be" if n else "")
            for n, m, kind in ((width, IN_MULTIPLE, "inputs"), (out, OUT_MULTIPLE, "outputs"))
            if n % m or not n
        ]
        return f"wint2: {'; '.join(wanted)}" if wanted else None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes U8 [out, in / 4], local_scale U8 [out, in / 64], and per output super_scale BF16, code_scale, code_zp F32."""
        out, width = spec.shape
        return {
            "codes": TensorSpec((out, width // 4), "U8"),
            "local_scale": TensorSpec((out, width // GROUP), "U8"),
            "super_scale": TensorSpec((out,), "BF16"),
            "code_scale": TensorSpec((out,), "F32"),
            "code_zp": TensorSpec((out,), "F32"),
        }

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """2, 4 for the local scale of each group (runtimes store two to a byte) and 80 for the scales of each output."""
        return 2 + 4 / GROUP + 80 / spec.shape[1]

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """With `hessian` f32 [in, in] among the statistics: feedback, and descent where the method says so."""
        if self.method == _feedback.NEAREST or "hessian" not in statistics:
            return None
        hessian = _feedback.hessian(spec, statistics)
        prepared = kernels.of("ccq_feedback", hessian).prepare(hessian, self.damping, CANDIDATES[:1])
        passes = _feedback.passes(self.method, self.passes)
        return _feedback.Feedback(lambda weight: _encode_with(weight, prepared, passes), self.encode)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of a weight [out, in] of any float dtype; codes are in the order that the runtime stores.

        Rows that hold NaN, infinity or more than 2**120 become zeros; a caller that measures (`measure.compare`) refuses them
        by name.
        """
        encoded: Encoded = kernels.of("ccq", weight).encode(weight, CANDIDATES[: self.effort])
        return encoded

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in], inputs in the order of the weight."""
        weight: torch.Tensor = kernels.of("ccq", encoded["codes"]).decode(encoded)
        return weight

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """The bytes that decode nearest to the weight, at the four scales; the lower one of two that decode alike."""
        return encoded | {"codes": kernels.of("ccq", weight).recode(weight, encoded)}


def _encode_with(weight: torch.Tensor, prepared: Prepared, passes: int) -> Encoded:
    """Fields of rows f32 [rows, in]."""
    import torch

    pair = torch.zeros(len(weight), dtype=torch.int64)
    encoded: Encoded = kernels.of("ccq_feedback", weight).encode(weight, prepared, pair, passes)
    return encoded


def _near(n: int, multiple: int) -> list[int]:
    """The multiples on both sides of n."""
    return [m for m in (n // multiple * multiple, -(-n // multiple) * multiple) if m]


CODEC = ConvolutionalCode
EXAMPLES = (
    ConvolutionalCode(),
    ConvolutionalCode(effort=4),
    ConvolutionalCode(effort=1),
    ConvolutionalCode(method="feedback"),
    ConvolutionalCode(method="descent"),
)
