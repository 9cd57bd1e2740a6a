"""W4A8: 4-bit experts whose inputs a kernel rounds to 8 bits with one scale per weight, known beforehand.

w ~ code * scale, codes -7 to 7, a scale per output channel; an input x is round(127 x / activation_scale), from -127 to 127.
With `hadamard_block_size` B the kernel multiplies every B inputs by the plain +-1 Hadamard matrix H before it rounds them, and
what is coded is W' = W H / B: H H = B I, so that W x = W' (H x). It spreads the outliers that down_proj sees over its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Measured, _feedback
from ernie_quant.codecs._largest import LARGEST, magnitude
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Codec, Encoded, Encoder

LARGEST_INPUT = 127  # of the 8 bits, on both sides of zero
MOST_BLOCK = 1024
# of the largest input, tried as a scale. Beside 1 alone, on benchmarks/smol_ernie.py --pad-hidden 640: KL .104 -> .091 (English),
# .151 -> .144 (Chinese), .218 -> .200 (Italian, which the calibration text leaves out)
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Weight4Activation8(Measured):
    """`hadamard_block_size`: inputs that are rotated together, a power of two; 0 for none. `scale`: "mse" or "absmax".

    `method`, `damping` and `passes` say what is done with statistics of the inputs (codecs/_feedback.py), whose Hessian is that
    of the inputs as they come: it is rotated here.
    """

    hadamard_block_size: int = 0
    scale: str = "mse"
    method: str = _feedback.NEAREST
    damping: float = _feedback.DAMPING
    passes: int = _feedback.PASSES
    rows = 1
    version = 1
    decodes_to = "BF16"
    needs = (LARGEST,)
    ratios = RATIOS
    inputs = "int8 activations of experts"

    def __post_init__(self) -> None:
        size = self.hadamard_block_size
        if type(size) is not int or not 0 <= size <= MOST_BLOCK or size == 1 or size & (size - 1):
            raise ValueError(f"hadamard_block_size is {size!r}, not 0 or a power of two up to {MOST_BLOCK}")
        _ = self._integers  # which checks the other options

    @property
    def _integers(self) -> RoundToNearest:
        """What is done with the weight that is coded."""
        return RoundToNearest(4, CHANNEL, self.scale, False, self.method, self.damping, self.passes)

    @property
    def rate(self) -> float:
        """A rotation takes longer than the codes."""
        return 90.0 if self.hadamard_block_size else 220.0

    @property
    def form(self) -> str:
        """Bits of weights and inputs, and the rotation."""
        rotated = f", Hadamard {self.hadamard_block_size}" if self.hadamard_block_size else ""
        return f"w4a8, per channel{rotated}"

    def describe(self) -> str:
        """For people."""
        return f"{self.form}, {self.scale}{_feedback.describe(self.method, self.damping, self.passes)}"

    def problem(self, spec: TensorSpec) -> str | None:
        """Two codes to a byte, and whole blocks."""
        width, size = spec.shape[1], self.hadamard_block_size
        if size and width % size:
            fits = [str(n) for n in (512, 256, 128, 64) if n < size and width % n == 0]
            would = f"; {', '.join(fits)} would" if fits else ""
            return f"w4a8: hadamard_block_size {size} does not divide {width} inputs{would}"
        return f"w4a8: {width} inputs are odd, and two are stored together" if width % 2 else None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes int8 [out, in], scale F32 [out, 1], and once activation_scale F32 [1]."""
        out, width = spec.shape
        return {
            "codes": TensorSpec((out, width), "I8"),
            "scale": TensorSpec((out, 1), "F32"),
            "activation_scale": TensorSpec((1,), "F32"),
        }

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """4, 32 for the scale of each output and 32 for that of the inputs."""
        return (4 * spec.numel + 32 * spec.shape[0] + 32) / spec.numel

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """With `largest` f32 [1] the scale of the inputs; with `hessian` f32 [in, in] feedback and descent too.

        Raises ErnieQuantError where one is known without the other, or cannot be.
        """
        if not statistics:
            return None
        once = {"activation_scale": self._activation_scale(statistics)}
        if self.method == _feedback.NEAREST or "hessian" not in statistics:
            return _feedback.Feedback(self.encode, self.encode, once)
        hessian = _feedback.hessian(spec, statistics)
        encoder = self._integers.prepare(spec, {"hessian": self._turned(self._turned(hessian).T)})
        assert encoder is not None
        return _feedback.Feedback(lambda weight: self._fields(encoder.encode(self._coded(weight))), self.encode, once)

    def _activation_scale(self, statistics: Encoded) -> torch.Tensor:
        """f32 [1]. Inputs that are all zeros have 1: any scale codes them, and programs divide by it. Raises ErnieQuantError."""
        import torch

        largest = magnitude(statistics, LARGEST, "w4a8", "the scale of the activations")
        return torch.where(largest > 0, largest, 1.0)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scale of a weight [out, in] of any float dtype; what they know of the inputs is in none."""
        coded = self._coded(weight)
        encoded = self._integers.encode(coded)
        # of a weight that is not in bf16, absmax rounds the scale after it has chosen the codes: again, for the stored one
        return self._fields(self._integers.recode(coded, encoded) if self.scale == "absmax" else encoded)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in], inputs as they come: W = W' H."""
        return self._rotated(encoded["codes"].float() * encoded["scale"]).bfloat16()

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """Codes of W' / scale, rounded."""
        return encoded | self._fields(self._integers.recode(self._coded(weight), encoded))

    def plain(self, weight: torch.Tensor, encoded: Encoded) -> tuple[Codec, torch.Tensor, Encoded]:
        """W', whose codes these are."""
        return self._integers, self._coded(weight), {"codes": encoded["codes"], "scale": encoded["scale"].bfloat16()}

    def seen(self, inputs: torch.Tensor) -> torch.Tensor:
        """f32 [tokens, in]: what the kernel rounds of inputs [tokens, in], which it has in bf16 and rotates in bf16."""
        return self._rotated(inputs.bfloat16()).float()

    def rounded(self, inputs: torch.Tensor, activation_scale: torch.Tensor) -> torch.Tensor:
        """f32 [tokens, in]: the inputs that a product with W would need for what the kernel makes of W'.

        q = round(127 seen / activation_scale), half away from zero, from -127 to 127 (PaddlePaddle/FastDeploy,
        custom_ops/gpu_ops/moe/moe_ffn.cu, moe_dispatch.cu).
        """
        ratio = self.seen(inputs) * (LARGEST_INPUT * (1 / activation_scale.float()))
        codes = (ratio.abs() + 0.5).floor().clamp(max=LARGEST_INPUT).copysign(ratio)
        return self._turned(codes * (activation_scale.float() / LARGEST_INPUT))

    def _coded(self, weight: torch.Tensor) -> torch.Tensor:
        """W', of which the codes are; divided first, so that no sum overflows."""
        return self._turned(weight.float()) if self.hadamard_block_size else weight

    def _turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """Columns times H / B."""
        return self._rotated(matrix.float() / (self.hadamard_block_size or 1))

    def _rotated(self, matrix: torch.Tensor) -> torch.Tensor:
        """Columns times H."""
        if not self.hadamard_block_size:
            return matrix
        rotated: torch.Tensor = kernels.of("hadamard", matrix).transform(matrix, self.hadamard_block_size)
        return rotated

    def _fields(self, integers: Encoded) -> Encoded:
        return {"codes": integers["codes"], "scale": integers["scale"].float()}


CODEC = Weight4Activation8
EXAMPLES = (
    Weight4Activation8(),
    Weight4Activation8(128),
    Weight4Activation8(32, "absmax"),
    Weight4Activation8(128, method="feedback"),
    Weight4Activation8(128, method="descent"),
)
