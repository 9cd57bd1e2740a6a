"""File formats, one file each, and the one way to write a file of any of them: header first, every tensor to its offset.

The plan knows every stored tensor, so a header is written before the first weight is read, and no file is ever in memory.
(The safetensors library can only write a file whose tensors are all in memory.)
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ernie_quant import plugins
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.disk import CHUNK, fsync, fsync_folder, leave_cache, naming, own_partial_of

if TYPE_CHECKING:
    import torch

Specs = Mapping[str, TensorSpec]
MOST_BEHIND = 2  # writes whose hash is not done: they hold their memory


@dataclass(frozen=True)
class FileLayout:
    """Where everything lies in a file: `head` at its beginning, tensors at `starts`, zeros between them."""

    head: bytes
    starts: Mapping[str, int]
    nbytes: int


class Format(Protocol):
    """What the file of a format has."""

    @property
    def VERSION(self) -> int:
        """Raised whenever the same tensors become other bytes of a file."""
        ...

    @property
    def EXTENSION(self) -> str:
        """Of its files: `.safetensors`."""
        ...

    @property
    def INDEX(self) -> str:
        """Name of the file that says which tensor is in which file; empty if there is none."""
        ...

    def order(self, specs: Specs) -> dict[str, TensorSpec]:
        """The order in which tensors, given step after step, lie in a file."""
        ...

    @property
    def SELF_CONTAINED(self) -> bool:
        """Do its files say all that a program must know, so that no config.json and no tokenizer stand beside them?"""
        ...

    def metadata_of(self, metadata: Mapping[str, Any], files: Sequence[Specs], number: int) -> Mapping[str, Any]:
        """What file `number` of several says of itself, from what all of them do."""
        ...

    def lay_out(self, specs: Specs, metadata: Mapping[str, Any]) -> FileLayout:
        """The header of a file whose tensors follow each other in the order of `specs`, and their places."""
        ...

    def index(self, files: Mapping[str, Specs]) -> dict[str, Any]:
        """The JSON of `INDEX`, from the tensors of each file."""
        ...


def find(name: str) -> Format:
    """The format of that name."""
    return cast(Format, plugins.load(sys.modules[__name__], name))


def extensions() -> tuple[str, ...]:
    """Those of all formats: what a weight file of ours ends with."""
    return tuple(cast(Format, module).EXTENSION for module in plugins.modules(sys.modules[__name__]))


def indexes() -> tuple[str, ...]:
    """The names of all formats' indexes."""
    return tuple(filter(None, (cast(Format, module).INDEX for module in plugins.modules(sys.modules[__name__]))))


def joint_crc32(parts: Iterable[int]) -> str:
    """One checksum, 8 hex digits, for a weight of several stored tensors: the crc32 of their crc32s, by name."""
    return f"{zlib.crc32(b''.join(part.to_bytes(4, 'little') for part in parts)):08x}"


@dataclass
class _Region:
    """The bytes that one weight has of a stored tensor: all of them, or its share of a stack.

    `unwritten` and `missing`: how many are not in the file yet, and how many the hash has not heard of.
    """

    spec: TensorSpec
    start: int
    unwritten: int
    missing: int
    crc32: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.spec.nbytes


class ShardWriter:
    """One output file. `write` in any order; `close` completes it; leaving with an error drops it.

    `stacks`: tensors in which several weights lie one after the other. The hash follows the writes, in a thread of its own,
    while they come in file order, and reads back (from the page cache) the little that came early. With `once` the file
    leaves the cache when it is on disk.
    """

    def __init__(self, path: Path, specs: Specs, layout: FileLayout, stacks: Iterable[str] = (), once: bool = False) -> None:
        self.path, self.nbytes, self._once = path, layout.nbytes, once
        self.partial = own_partial_of(path)
        self._regions: dict[tuple[str, int | None], _Region] = {}
        for name in sorted(specs, key=layout.starts.__getitem__):
            stacked = name in stacks
            spec = (TensorSpec(specs[name].shape[1:], specs[name].dtype) if stacked else specs[name]).held
            for index in range(specs[name].shape[0]) if stacked else [None]:
                start = layout.starts[name] + (index or 0) * spec.nbytes
                self._regions[name, index] = _Region(spec, start, spec.nbytes, spec.nbytes)
        self._order = iter(self._regions.values())
        self._next: _Region | None = next(self._order, None)
        self._hash = hashlib.sha256(layout.head)
        self._hashed = len(layout.head)
        self._hasher, self._behind = ThreadPoolExecutor(1), deque[Future[None]]()
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            self._put(memoryview(layout.head), 0)
        except OSError:
            self._drop()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._drop()

    def _drop(self) -> None:
        self._hasher.shutdown(cancel_futures=True)  # it reads the file
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.partial.unlink(missing_ok=True)

    def write(self, name: str, tensor: torch.Tensor, axis: int | None = None, first: int = 0, index: int | None = None) -> None:
        """Store what one weight has of `name`, or a slab of it: what begins at `first` along `axis`.

        `index`: which weight of a stack it is.
        """
        from ernie_quant.dtypes import as_bytes, dtype_name

        region = self._regions[name, index]
        axis = axis or 0
        spec, shape = region.spec, region.spec.shape
        wanted = (*shape[:axis], tensor.shape[axis] if shape else 0, *shape[axis + 1 :]) if shape else ()
        assert (tuple(tensor.shape), dtype_name(tensor.dtype)) == (wanted, spec.dtype), (name, tensor.shape, tensor.dtype, spec)
        data = as_bytes(tensor)
        assert len(data) <= region.unwritten, f"{name}: written twice"
        step = spec.nbytes // max(1, math.prod(shape[: axis + 1]))  # bytes per index along the axis
        at = region.start + first * step
        outer = math.prod(shape[:axis])
        run, row = len(data) // max(1, outer), step * math.prod(shape[axis : axis + 1])
        for i in range(outer):
            self._put(data[i * run : (i + 1) * run], at + i * row)
        region.unwritten -= len(data)
        self._wait_for_hash(MOST_BEHIND - 1)
        self._behind.append(self._hasher.submit(self._account, region, data, at, outer == 1))

    def _wait_for_hash(self, behind: int) -> None:
        while len(self._behind) > behind:
            self._behind.popleft().result()

    def _account(self, region: _Region, data: memoryview, at: int, whole: bool) -> None:
        """The hash's part of a write that has been done; `whole`: its bytes are neighbours in the file."""
        region.missing -= len(data)
        if at == self._hashed and whole:
            self._digest(region, data)
        self._catch_up()

    def _put(self, data: memoryview, at: int) -> None:
        with naming(self.path):
            while data:
                done = os.pwrite(self._fd, data, at)
                data, at = data[done:], at + done

    def _digest(self, region: _Region, data: bytes | memoryview) -> None:
        self._hash.update(data)
        region.crc32 = zlib.crc32(data, region.crc32)
        self._hashed += len(data)

    def crc32(self, parts: Iterable[tuple[str, int | None]]) -> str:
        """`joint_crc32` of what a weight has of stored tensors: their names, and its number in each."""
        self._wait_for_hash(0)
        return joint_crc32(self._regions[part].crc32 for part in sorted(parts, key=lambda part: (part[0], part[1] or 0)))

    def _catch_up(self) -> None:
        """Hash what was written before its turn, and the zeros before it."""
        while self._next is not None and not self._next.missing:
            self._skip_to(self._next.start)
            while self._hashed < self._next.stop:
                data = os.pread(self._fd, min(CHUNK, self._next.stop - self._hashed), self._hashed)
                self._digest(self._next, data)
            self._next = next(self._order, None)
            if self._next is not None:
                self._skip_to(self._next.start)

    def _skip_to(self, start: int) -> None:
        self._hash.update(bytes(max(0, start - self._hashed)))
        self._hashed = max(self._hashed, start)

    def close(self) -> str:
        """Make the file durable under its final name; its sha256."""
        unwritten = [name for (name, _), region in self._regions.items() if region.unwritten]
        assert not unwritten, f"{self.path.name}: not written: {unwritten[:3]}"
        self._wait_for_hash(0)
        self._skip_to(self.nbytes)
        assert self._hashed == self.nbytes, f"{self.path.name}: {self._hashed} of {self.nbytes} bytes hashed"
        with naming(self.path):
            if os.fstat(self._fd).st_size < self.nbytes:  # zeros at the end
                os.ftruncate(self._fd, self.nbytes)
            fsync(self._fd)
        if self._once:
            leave_cache(self._fd)
        self._hasher.shutdown()
        os.close(self._fd)
        self._fd = -1
        os.replace(self.partial, self.path)
        fsync_folder(self.path.parent)
        return self._hash.hexdigest()
