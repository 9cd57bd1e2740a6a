"""Error formulas, with their units.

rel_error      ||W - W'||^2 / ||W||^2
sqnr_db        -10 log10(rel_error), in decibels; None where nothing differs
max_abs_error  max |W - W'|, in units of the weight

What is kept has no error, but may hold values that no sound model has; these are counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.errors import CheckpointError

if TYPE_CHECKING:
    import torch

WEIGHT = re.compile(r"\.weight(_\d+)?$")  # weight_1: the second router of a VL model
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


@dataclass(frozen=True)
class Values:
    """What of a weight, or of a part of it, no sound model has; parts add up."""

    not_finite: int = 0  # elements that are NaN or infinity
    only_zeros: bool = True

    def __add__(self, other: Values) -> Values:
        return Values(self.not_finite + other.not_finite, self.only_zeros and other.only_zeros)


def values_of(tensor: torch.Tensor) -> Values:
    """Of a tensor of any dtype, in one pass; whole numbers (codes) are never odd."""
    if not tensor.is_floating_point():
        return Values(only_zeros=False)
    if not tensor.numel():
        return Values()
    numbers = tensor.float() if tensor.element_size() == 1 else tensor
    low, high = (float(end) for end in numbers.aminmax())  # NaN is either, infinity one of them
    if math.isfinite(low) and math.isfinite(high):
        return Values(only_zeros=low == high == 0)
    return Values(int((~numbers.isfinite()).sum()), only_zeros=False)


def means_something(name: str) -> bool:
    """Is it odd that this is all zeros? Of a matrix, a router, an embedding or a norm; a bias, of routing too, may be."""
    return WEIGHT.search(name) is not None


def compare(name: str, weight: torch.Tensor, decoded: torch.Tensor) -> Difference:
    """The sums for a weight (or a slab of it) and what became of it. Raises what `checked` raises."""
    return checked(name, weight, squares(weight, decoded))


def squares(weight: torch.Tensor, decoded: torch.Tensor) -> Difference:
    """The sums, whatever they are."""
    import torch

    from ernie_quant import kernels

    weight, decoded = (t if t.dtype in (torch.bfloat16, torch.float32) else t.float() for t in (weight, decoded))
    if weight.dim() != 2:  # a norm or a bias
        weight, decoded = weight.reshape(1, -1), decoded.reshape(1, -1)
    return Difference(*kernels.of("difference", weight).squares(weight, decoded))


def checked(name: str, weight: torch.Tensor, difference: Difference) -> Difference:
    """The sums of a weight, if it may be quantized.

    Raises CheckpointError for NaN and infinity, in it or in what became of it, and for what is too large to be quantized.
    """
    if not math.isfinite(difference.total):
        raise CheckpointError(f"{name}: holds NaN or infinity, which cannot be quantized")
    if difference.total > LARGEST**2 and abs(peak := _peak(weight)) > LARGEST:  # many smaller ones may add up to as much
        raise CheckpointError(
            f"{name}: holds {peak:.4g}; weights are quantized up to {LARGEST:.4g} (2^120), and no sound model has larger ones:"
            " get the file again, or keep this tensor (quantize with a --recipe that leaves it out, or convert)"
        )
    if not math.isfinite(difference.error + difference.largest):
        raise CheckpointError(f"{name}: its codes decode to NaN or infinity; keep this tensor, or choose another format for it")
    return difference


def _peak(weight: torch.Tensor) -> float:
    """The element of the largest magnitude."""
    return float(weight.flatten()[weight.abs().argmax()])
