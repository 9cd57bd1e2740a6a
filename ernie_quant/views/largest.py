"""The largest number of some tensors, as a view of one number: what weights have that share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.devices import CPU
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import Decoded, T, View, spec_of
from ernie_quant.views.read import read, slabs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Largest:
    """The largest |w| of tensors, f32 [1]; NaN and infinity, for which nothing is large enough, are left out."""

    of: tuple[View, ...]

    @property
    def spec(self) -> TensorSpec:
        """One number."""
        return TensorSpec((1,), "F32")

    @property
    def parts(self) -> Mapping[str, View]:
        """The tensors."""
        return {str(i): view for i, view in enumerate(self.of)}

    def slabs(self) -> list[tuple[int, int]]:
        """All of it."""
        return [(0, 1)]

    def read(self, files: Files, rows: tuple[int, int], device: str = CPU) -> torch.Tensor:
        """f32 [1] on the CPU, from slabs of the tensors, one at a time."""
        import torch

        found = torch.zeros(1)
        for view in self.of:
            view = view.base if isinstance(view, T) else view  # transposed it has the same numbers
            for first, last in slabs(spec_of(view), _together(view)):
                found = found.maximum(largest(read(view, files, (first, last))))
        return found


def _together(view: View) -> int:
    """Rows that can be read by themselves are a multiple of it: of what is decoded, the source says."""
    if isinstance(view, Decoded) and (rows := view.source.slabs()):
        return rows[0][1] - rows[0][0]
    return 1


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """f32 [1]: the largest finite |w|, 0 where there is none."""
    import torch

    if not tensor.numel():
        return torch.zeros(1)
    magnitude = tensor.abs()
    found = magnitude.max().float()
    if not found.isfinite():
        found = torch.where(magnitude.isfinite(), magnitude, 0).max().float()
    return found.reshape(1)
