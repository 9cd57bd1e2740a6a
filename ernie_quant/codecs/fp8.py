"""Float8 (e4m3) in blocks of 128 x 128 that share a float32 scale, as DeepSeek-V3 stores its weights.

w ~ code * scale, scale = max|w| / 448 per block (deepseek-ai/DeepSeek-V3, inference/kernel.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant import kernels
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs import DataFree
from ernie_quant.measure import Difference

if TYPE_CHECKING:
    import torch

    from ernie_quant.codecs import Encoded

BLOCK = 128
FP8, COMPRESSED_TENSORS = "fp8", "compressed-tensors"


@dataclass(frozen=True)
class Float8Block(DataFree):
    """`quant_method` is what config.json will call it: the same codes and scales, found under other names.

    transformers, SGLang and vLLM load text models as "fp8"; vLLM's reader of it turns the routers of VL models into float8
    too, and loads them as "compressed-tensors".
    """

    quant_method: str = FP8
    rows = BLOCK
    rate = 400.0
    version = 1

    def __post_init__(self) -> None:
        if self.quant_method not in (FP8, COMPRESSED_TENSORS):
            raise ValueError(f"quant_method is {self.quant_method!r}, not {FP8} or {COMPRESSED_TENSORS}")

    @property
    def form(self) -> str:
        """Size of a block, and whose words where they are not the usual ones."""
        return f"fp8, blocks {BLOCK}x{BLOCK}" + ("" if self.quant_method == FP8 else f", {self.quant_method}")

    def describe(self) -> str:
        """For people."""
        return self.form

    def problem(self, spec: TensorSpec) -> str | None:
        """Both widths must be multiples of 128: vLLM's kernels for experts load no partial blocks."""
        ragged = [n for n in spec.shape if n % BLOCK]
        return f"blocks of {BLOCK} do not divide {' and '.join(map(str, ragged))}" if ragged else None

    def specs(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """codes float8 [out, in] and scale f32 [out / 128, in / 128]."""
        out, width = spec.shape
        return {
            "codes": TensorSpec((out, width), "F8_E4M3"),
            "scale": TensorSpec((out // BLOCK, width // BLOCK), "F32"),
        }

    def bits_per_weight(self, spec: TensorSpec) -> float:
        """8, and 32 for the scale of each block."""
        return 8 + 32 / BLOCK**2

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Codes and scales of a weight [out, in] whose sizes are multiples of 128."""
        return self.measured(weight)[0]

    def measured(self, weight: torch.Tensor) -> tuple[Encoded, Difference]:
        """Codes and scales, and what the kernel saw being lost."""
        codes, scale, sums = kernels.of("fp8", weight).encode(weight)
        return {"codes": codes, "scale": scale}, Difference(*sums)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """bf16 [out, in]."""
        weight: torch.Tensor = kernels.of("fp8", encoded["codes"]).decode(encoded["codes"], encoded["scale"])
        return weight

    def recode(self, weight: torch.Tensor, encoded: Encoded) -> Encoded:
        """Codes of weight / scale, rounded."""
        return encoded | {"codes": kernels.of("fp8", weight).codes(weight, encoded["scale"])}


CODEC = Float8Block
EXAMPLES = (Float8Block(), Float8Block(COMPRESSED_TENSORS))
