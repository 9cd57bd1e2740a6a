"""The kinds of views: tensors that are not read yet, transposed, cut or joined from what lies in the files.

They are made by the functions of `views.build`, which simplify, and read by `views.read`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ernie_quant.checkpoint import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch

    from ernie_quant.views.files import Files


@dataclass(frozen=True)
class Leaf:
    """A stored tensor as it lies in its file; of ggml's blocks, their bytes."""

    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file; reversed where the file is column-major."""
        return self.ref.spec.held.shape[::-1] if self.ref.fortran else self.ref.spec.held.shape

    @property
    def dtype(self) -> str:
        """safetensors' spelling."""
        return self.ref.spec.held.dtype


@dataclass(frozen=True)
class T:
    """A matrix transposed."""

    base: View

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base, reversed."""
        return self.base.shape[::-1]

    @property
    def dtype(self) -> str:
        """Of the base."""
        return self.base.dtype


@dataclass(frozen=True)
class Cut:
    """`base[start:stop]` along `axis`."""

    base: View
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base, `stop - start` along `axis`."""
        shape = list(self.base.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def dtype(self) -> str:
        """Of the base."""
        return self.base.dtype


@dataclass(frozen=True)
class Pick:
    """`base[index]`: one of several tensors that are stacked in one."""

    base: View
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base, without its first axis."""
        return self.base.shape[1:]

    @property
    def dtype(self) -> str:
        """Of the base."""
        return self.base.dtype


@dataclass(frozen=True)
class Cat:
    """`parts` one after the other along `axis`."""

    parts: tuple[View, ...]
    axis: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the first part, with the sum of the parts along `axis`."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(p.shape[self.axis] for p in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> str:
        """Of the first part."""
        return self.parts[0].dtype


@dataclass(frozen=True)
class Replicated:
    """Copies of one tensor, as every tensor-parallel rank has them; reading compares them."""

    copies: tuple[View, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first copy."""
        return self.copies[0].shape

    @property
    def dtype(self) -> str:
        """Of the first copy."""
        return self.copies[0].dtype


@dataclass(frozen=True)
class Fold:
    """Every `by` rows of a matrix end to end: [R / by, C * by]. For layouts that interleave rows."""

    base: View
    by: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[R / by, C * by]."""
        return (self.base.shape[0] // self.by, self.base.shape[1] * self.by)

    @property
    def dtype(self) -> str:
        """Of the base."""
        return self.base.dtype


@dataclass(frozen=True)
class Unfold:
    """The inverse of `Fold`: [R * by, C / by]."""

    base: View
    by: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[R * by, C / by]."""
        return (self.base.shape[0] * self.by, self.base.shape[1] // self.by)

    @property
    def dtype(self) -> str:
        """Of the base."""
        return self.base.dtype


class Readable(Protocol):
    """A matrix that something else knows how to read in slabs of rows, such as a quantized one."""

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype of the matrix."""
        ...

    @property
    def parts(self) -> Mapping[str, View]:
        """The stored tensors it is computed from."""
        ...

    def slabs(self) -> list[tuple[int, int]]:
        """Ranges of rows that can be read by themselves."""
        ...

    def read(self, files: Files, rows: tuple[int, int], device: str = "cpu") -> torch.Tensor:
        """One of them."""
        ...


@dataclass(frozen=True)
class Decoded:
    """A matrix that is computed from what is stored."""

    source: Readable

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.source.spec.shape

    @property
    def dtype(self) -> str:
        """Of the matrix."""
        return self.source.spec.dtype


View: TypeAlias = Leaf | T | Cut | Pick | Cat | Replicated | Fold | Unfold | Decoded


def spec_of(view: View) -> TensorSpec:
    """Shape and dtype."""
    return TensorSpec(view.shape, view.dtype)
