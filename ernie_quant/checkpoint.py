"""A checkpoint as names, shapes and places: headers and config, never data."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ernie_quant.dtypes import BLOCKS, nbytes
from ernie_quant.errors import CheckpointError, line_of


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype (a key of `dtypes.ITEMSIZE` or `dtypes.BLOCKS`) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return nbytes(self.dtype, self.numel)

    @property
    def held(self) -> TensorSpec:
        """As it is held in memory: rows of blocks are rows of bytes."""
        if self.dtype not in BLOCKS:
            return self
        *outer, width = self.shape
        return TensorSpec((*outer, nbytes(self.dtype, width)), "U8")


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file: `nbytes` of payload that begin at `start`.

    `latin1` marks the way pickle protocol 2 stores bytes: as UTF-8 of a latin-1 text, so that `stored` bytes in
    the file stand for `nbytes` of payload.
    """

    start: int
    nbytes: int
    stored: int = 0
    latin1: bool = False


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor lies: row-major data in one extent of `file` (several for split .pdparams arrays)."""

    name: str
    spec: TensorSpec
    file: Path
    extents: tuple[Extent, ...]
    fortran: bool = False  # stored column-major: the data are those of the transposed shape


@dataclass(frozen=True, slots=True)
class Stamp:
    """Size and time of a file when its header was read: what is read later must be of the same file."""

    nbytes: int
    mtime_ns: int

    @staticmethod
    def of(file: Path | int) -> Stamp:
        """Of a path or a descriptor. Raises OSError."""
        found = file.stat() if isinstance(file, Path) else os.fstat(file)
        return Stamp(found.st_size, found.st_mtime_ns)

    def check(self, path: Path, fd: int | None = None) -> None:
        """Is the file (or what `fd` has open) still the same? Raises CheckpointError."""
        try:
            now = Stamp.of(path if fd is None else fd)
        except OSError as error:
            raise CheckpointError(f"{path}: was there when the run began, and now: {error.strerror}") from None
        if now != self:
            what = f"has {now.nbytes} bytes, had {self.nbytes}" if now.nbytes != self.nbytes else "was written to"
            raise CheckpointError(
                f"{path}: has changed since the run began ({what}); run it again, and what was begun with --restart"
            )


@dataclass(frozen=True)
class Rank:
    """One complete set of tensors: the whole model, or one tensor-parallel rank of it."""

    refs: dict[str, TensorRef]
    files: Mapping[Path, Stamp]


class Downloader(Protocol):
    """Brings weight files that are not in the folder yet."""

    def stream(self, needs: Sequence[Sequence[Path]], budget: int | None) -> AbstractContextManager[Download]:
        """Bring `needs[0]`, `needs[1]`, … in this order, with at most `budget` bytes of them on disk."""
        ...

    def needed_at_once(self, needs: Sequence[Collection[Path]]) -> int:
        """Bytes that must lie on disk together, for `needs` one after the other."""
        ...

    def check_budget(self, needs: Sequence[Collection[Path]], budget: int) -> None:
        """Is it enough for what must lie on disk together? Raises CheckpointError."""
        ...

    def bring(self, path: Path) -> None:
        """A file beside the weights, to its place in the folder. Raises CheckpointError or RetryError."""
        ...


class Download(Protocol):
    """Files that are on their way."""

    @property
    def stamps(self) -> Mapping[Path, Stamp]:
        """Of files that may change under our feet; none of those that come with a hash."""
        ...

    def path(self, path: Path) -> Path:
        """Where the bytes of a file lie; waits for them."""
        ...

    def done(self, number: int) -> None:
        """`needs[number]` have been used."""
        ...

    def stop(self) -> None:
        """Nothing more is wanted; who waits for a file waits no more."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """Files that are there: those of a folder where they are, others at `places`."""

    stamps: Mapping[Path, Stamp]
    places: Mapping[Path, Path] = field(default_factory=dict)

    def path(self, path: Path) -> Path:
        """Where it is."""
        return self.places.get(path, path)

    def done(self, number: int) -> None:
        """Nothing is dropped."""

    def stop(self) -> None:
        """Nobody waits."""


@dataclass(frozen=True)
class Checkpoint:
    """Headers and config of a checkpoint; `ranks` has one entry unless it was saved per tensor-parallel rank."""

    folder: Path
    config: dict[str, Any]
    ranks: tuple[Rank, ...]
    anomalies: tuple[str, ...] = ()  # what the files themselves disagree about
    notes: tuple[str, ...] = ()  # worth a line, but no error
    extra_files: Mapping[Path, int] = field(
        default_factory=dict
    )  # beside the weights, and their bytes; a plan says which to carry
    revision: str = ""  # commit of the hub repository, if it is one or a download client left a note of it
    address: str = ""  # of a repository on a hub: hf://org/name
    downloader: Downloader | None = None  # brings the files of such a one
    links: bool = False  # are those that lead out of the folder followed?
    extra_folders: tuple[str, ...] = ()  # subfolders that nobody looked into
    slips: tuple[str, ...] = ()  # where an index is wrong, although every tensor is there
    others: tuple[str, ...] = ()  # notes on weights that are there and not read

    @property
    def title(self) -> str:
        """What people call it: the name of the repository or of the folder, whose bytes need not be text."""
        return line_of(self.address.rpartition("/")[2] or self.folder.resolve().name)

    def download(self, needs: Sequence[Sequence[Path]], budget: int | None = None) -> AbstractContextManager[Download]:
        """The weight files `needs[0]`, `needs[1]`, …, in this order. Raises CheckpointError or RetryError."""
        return nullcontext(OnDisk(self.stamps)) if self.downloader is None else self.downloader.stream(needs, budget)

    def bring(self, files: Iterable[Path]) -> None:
        """Files beside the weights are in the folder after this. Raises CheckpointError or RetryError."""
        if self.downloader is not None:
            for file in files:
                self.downloader.bring(file)

    def name_of(self, file: Path) -> str:
        """A file of the checkpoint as its config names files: relative, with slashes."""
        return Path(os.path.relpath(file, self.folder)).as_posix()

    @property
    def refs(self) -> dict[str, TensorRef]:
        """The tensors of the first rank, by name."""
        return self.ranks[0].refs

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """Of the weight files; what else lies there may change while a run is at work."""
        return {file: stamp for rank in self.ranks for file, stamp in rank.files.items()}

    @property
    def changeable(self) -> dict[Path, Stamp]:
        """Stamps of the weight files that may change under our feet; none of those that come with a hash."""
        return {} if self.downloader else self.stamps

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in all ranks."""
        return sum(ref.spec.nbytes for rank in self.ranks for ref in rank.refs.values())
