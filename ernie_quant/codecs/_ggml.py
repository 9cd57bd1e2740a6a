"""What the codecs of ggml's block types share: rows of blocks, each with its scales, in the bytes that llama.cpp reads.

Statistics of the inputs weigh the squared errors of a search; no code makes up for the error of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import Measured, _feedback
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.dtypes import BLOCKS
from ernie_quant.errors import ErnieQuantError

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Codec, Encoded, Encoder

IMPORTANCE, HESSIAN = "importance", "hessian"  # statistics: mean of x^2 per input, and the mean of x' x, whose diagonal it is
SUGGESTED = ("Q8_0", "Q5_0", "Q4_0", "IQ4_NL")  # for rows that 256 does not divide


@dataclass(frozen=True)
class Blocks(Measured):
    """A type has no options: its bytes are all that a file shows of it."""

    dtype: ClassVar[str]
    adopts: ClassVar[int] = 0  # bits of integer codes that it holds as they are
    rows = 1
    decodes_to = "F32"
    rate = 0.0
    version = 1

    @property
    def form(self) -> str:
        """ggml's name of the type."""
        return self.dtype

    def describe(self) -> str:
        """For people."""
        return self.dtype

    def problem(self, spec: TensorSpec) -> str | None:
        """A row is whole blocks."""
        elements, width = BLOCKS[self.dtype][0], spec.shape[1]
        if width % elements == 0:
            return None
        fits = [name for name in SUGGESTED if width % BLOCKS[name][0] == 0] or ["F16", "BF16"]
        return f"blocks of {elements} weights, as {self.dtype} has, do not divide its rows of {width}; {', '.join(fits)} would"

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """blocks uint8 [out, bytes of a row]."""
        return {"blocks": TensorSpec(spec.shape, self.dtype).held}

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """Scales included."""
        elements, nbytes = BLOCKS[self.dtype]
        return 8 * nbytes / elements

    def prepare(self, spec: TensorSpec, statistics: Encoded) -> Encoder | None:
        """With the `importance` f32 [in] of the inputs, or their `hessian` f32 [in, in]: the errors that matter more are less.

        Raises ErnieQuantError for statistics of another width.
        """
        if HESSIAN in statistics:
            return Weighted(self, _feedback.hessian(spec, statistics).diagonal().contiguous())
        if IMPORTANCE not in statistics:
            return None
        found = statistics[IMPORTANCE]
        if tuple(found.shape) != (spec.shape[1],):
            shape = " x ".join(map(str, found.shape))
            raise ErnieQuantError(f"statistics of inputs are {shape}, and the weight has {spec.shape[1]} inputs")
        return Weighted(self, found)

    @property
    def kernels_name(self) -> str:
        """Of the file in `kernels`."""
        return f"ggml_{self.dtype.lower()}"

    def _kernels(self, tensor: torch.Tensor) -> Any:
        return kernels.of(self.kernels_name, tensor)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The blocks of a weight [out, in] of any float dtype."""
        return {"blocks": self._kernels(weight).encode(weight)}

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """f32 [out, in]: what ggml computes, to the bit."""
        weight: torch.Tensor = self._kernels(encoded["blocks"]).decode(encoded["blocks"])
        return weight

    def adopted(self, codec: Codec, encoded: Encoded) -> Encoded | None:
        """The blocks that hold the very codes and scales of another codec; None where they cannot."""
        import torch

        if not isinstance(codec, RoundToNearest) or codec.bits != self.adopts:
            return None
        codes, scale = encoded["codes"], encoded["scale"]
        group, size = codes.shape[1] // scale.shape[1], BLOCKS[self.dtype][0]
        half = scale.to(torch.float16)
        if group % size or not torch.equal(half.float(), scale.float()):
            return None
        spread = half.repeat_interleave(group // size, 1)
        return {"blocks": self._kernels(codes).pack(codes, spread)}

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """The nearest codes at the stored scales; where a scale is zero the codes that are there."""
        return {"blocks": kernels.of("ggml_recode", weight).recode(self.dtype, weight, encoded["blocks"])}


@dataclass(frozen=True)
class Weighted:
    """Encodes rows with the importance of their inputs."""

    codec: Blocks
    importance: torch.Tensor

    @property
    def once(self) -> Encoded:
        """Nothing: a file does not show it."""
        return {}

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The blocks of rows [rows, in]."""
        return {"blocks": self.codec._kernels(weight).encode(weight, self.importance)}
