"""Error formulas, with their units.

rel_error      ||W - W'||^2 / ||W||^2
sqnr_db        -10 log10(rel_error), in decibels; None where nothing differs
max_abs_error  max |W - W'|, in units of the weight
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.errors import CheckpointError

if TYPE_CHECKING:
    import torch

LARGEST = 2.0**120  # of a weight: beyond it scales round up to infinity, or a row vanishes, as WINT2 stores it


@dataclass(frozen=True)
class Difference:
    """Sums over a weight, or over a part of it; parts add up."""

    error: float = 0.0  # ||W - W'||^2
    total: float = 0.0  # ||W||^2
    largest: float = 0.0  # max |W - W'|

    def __add__(self, other: Difference) -> Difference:
        return Difference(self.error + other.error, self.total + other.total, max(self.largest, other.largest))

    @property
    def rel_error(self) -> float:
        """||W - W'||^2 / ||W||^2; 0 for a weight of zeros that stayed one."""
        if self.total == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.total

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise, in dB."""
        return -10 * math.log10(self.rel_error) if 0 < self.rel_error < math.inf else None


def compare(name: str, weight: torch.Tensor, decoded: torch.Tensor) -> Difference:
    """The sums for a weight (or a slab of it) and what became of it.

    Raises CheckpointError for NaN and infinity, in either, and for what is too large to be quantized.
    """
    import torch

    from ernie_quant import kernels

    if weight.dtype not in (torch.bfloat16, torch.float32):
        weight = weight.float()
    error, total, largest = kernels.of("difference", weight).squares(weight, decoded)
    if not math.isfinite(total):
        raise CheckpointError(f"{name}: holds NaN or infinity, which cannot be quantized")
    if total > LARGEST**2 and abs(peak := _peak(weight)) > LARGEST:  # many smaller ones may add up to as much
        raise CheckpointError(
            f"{name}: holds {peak:.4g}; weights are quantized up to {LARGEST:.4g} (2^120), and no sound model has larger ones:"
            " get the file again, or keep this tensor (quantize with a --recipe that leaves it out, or convert)"
        )
    if not math.isfinite(error + largest):
        raise CheckpointError(f"{name}: its codes decode to NaN or infinity; keep this tensor, or choose another format for it")
    return Difference(error, total, largest)


def _peak(weight: torch.Tensor) -> float:
    """The element of the largest magnitude."""
    return float(weight.flatten()[weight.abs().argmax()])
