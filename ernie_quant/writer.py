"""A safetensors file written in place: header first, every tensor straight to its offset, final name at the end.

The safetensors library can only write a file whose tensors are all in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_quant.checkpoint import TensorSpec

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
CHUNK = 8 << 20


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a safetensors header whose tensors follow each other in the order of `specs`."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, spec in specs.items():
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def joint_crc32(parts: Iterable[int]) -> str:
    """One checksum, 8 hex digits, for a weight of several stored tensors: the crc32 of their crc32s, by name."""
    return f"{zlib.crc32(b''.join(part.to_bytes(4, 'little') for part in parts)):08x}"


def file_sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """The hash of a file on disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            progress(len(data))
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a descriptor says the name of its file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> str:
    """Write a small file through a partial one; its sha256."""
    partial = path.with_name(path.name + PARTIAL)
    with naming(path), open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)
    return hashlib.sha256(data).hexdigest()


class ShardWriter:
    """One output file. `write` in any order; `close` completes it; leaving with an error drops it.

    The hash follows the writes while they come in file order, and reads back (from the page cache) the little that
    came early.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.path, self.specs = path, specs
        self.partial = path.with_name(path.name + PARTIAL)
        head = header_bytes(specs, metadata)
        self._start: dict[str, int] = {}
        at = len(head)
        for name, spec in specs.items():
            self._start[name] = at
            at += spec.nbytes
        self.nbytes = at
        self._missing = {name: spec.nbytes for name, spec in specs.items()}
        self._order = iter(specs)
        self._next: str | None = next(self._order, None)
        self._hash = hashlib.sha256(head)
        self._hashed = len(head)
        self._crc32 = dict.fromkeys(specs, 0)
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            self._put(memoryview(head), 0)
        except OSError:
            self._drop()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._drop()

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.partial.unlink(missing_ok=True)

    def write(self, name: str, tensor: torch.Tensor, first: int = 0, of: int = 1) -> None:
        """Store `name`, or a slab of it: what begins at `first / of` of the axis along which it is cut."""
        from ernie_quant.tensors import DTYPE_NAMES, as_bytes

        spec = self.specs[name]
        assert DTYPE_NAMES[tensor.dtype] == spec.dtype, (name, tensor.dtype, spec)
        cut = [axis for axis, size in enumerate(spec.shape) if size != tensor.shape[axis]]
        axis = cut[0] if cut else 0
        assert tensor.dim() == len(spec.shape), (name, tensor.shape, spec)
        assert len(cut) <= 1, (name, tensor.shape, spec)
        assert axis <= 1, (name, tensor.shape, spec)
        data = as_bytes(tensor)
        assert len(data) <= self._missing[name], f"{name}: written twice"
        start = first * spec.shape[axis] // of if spec.shape else 0
        stride = spec.nbytes // max(1, math.prod(spec.shape[: axis + 1]))  # bytes per step along the axis
        at = self._start[name] + start * stride
        if axis == 0:
            self._put(data, at)
        else:
            run, row = tensor.shape[1] * stride, spec.shape[1] * stride
            for i in range(spec.shape[0]):
                self._put(data[i * run : (i + 1) * run], at + i * row)
        self._missing[name] -= len(data)
        if at == self._hashed and axis == 0:
            self._digest(name, data)
        self._catch_up()

    def _put(self, data: memoryview, at: int) -> None:
        with naming(self.path):
            while data:
                done = os.pwrite(self._fd, data, at)
                data, at = data[done:], at + done

    def _digest(self, name: str, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._crc32[name] = zlib.crc32(data, self._crc32[name])
        self._hashed += len(data)

    def crc32(self, names: Iterable[str]) -> str:
        """`joint_crc32` of stored tensors."""
        return joint_crc32(self._crc32[name] for name in sorted(names))

    def _catch_up(self) -> None:
        """Hash what was written before its turn."""
        while self._next is not None and not self._missing[self._next]:
            stop = self._start[self._next] + self.specs[self._next].nbytes
            while self._hashed < stop:
                data = os.pread(self._fd, min(CHUNK, stop - self._hashed), self._hashed)
                self._digest(self._next, data)
            self._next = next(self._order, None)

    def close(self) -> str:
        """Make the file durable under its final name; its sha256."""
        unwritten = [name for name, left in self._missing.items() if left]
        assert not unwritten, f"{self.path.name}: not written: {unwritten[:3]}"
        assert self._hashed == self.nbytes, f"{self.path.name}: {self._hashed} of {self.nbytes} bytes hashed"
        with naming(self.path):
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        os.replace(self.partial, self.path)
        fsync_folder(self.path.parent)
        return self._hash.hexdigest()
