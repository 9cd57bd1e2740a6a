"""The beginning of a GGUF file, read piece by piece: nothing is allocated for what the file is too short for.

Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO, NoReturn

from ernie_quant.errors import CheckpointError
from ernie_quant.ggml import ARRAY, BOOL, MAGIC, SCALARS, STRING, VERSION

# Together they keep the memory of reading below 0.6 GB, whatever a file holds; see tests/readers/test_bounds.py.
MAX_BYTES = 64 << 20  # of a header; that of the 21B, with a vocabulary of 103,424, has 3 MB
MAX_ITEMS = 3_000_000  # of all arrays; three per token and one per merge: 1.3 million for the largest vocabularies
MAX_KEYS = 10_000  # a model has fewer than 100
MAX_KEY = 65_535  # bytes of one, as the format says
CHUNK = 1 << 20

BIG_ENDIAN = int.from_bytes(VERSION.to_bytes(4, "big"), "little")
LENGTH = struct.Struct("<Q")


class Head:
    """A place in a header that moves on with all that is read. `what` is the key or tensor that it is read for."""

    def __init__(self, file: BinaryIO, name: str, file_bytes: int) -> None:
        self.name, self.file_bytes, self.at = name, file_bytes, 0
        self._file = file
        self._data = bytearray()
        self._items = 0

    def counts(self) -> tuple[int, int]:
        """Numbers of tensors and of keys, after magic and version. Raises CheckpointError."""
        if (magic := self._bytes(4, "its magic")) != MAGIC:
            self.refuse("", f"is no GGUF file: it begins with {bytes(magic)!r}, not with {MAGIC!r}")
        version = self.number("I", "its version")
        if version == BIG_ENDIAN:
            self.refuse("", "is a big-endian GGUF file; only little-endian ones are read")
        if version != VERSION:
            self.refuse("", f"is of version {version} of GGUF; only version {VERSION} is read")
        return self.number("Q", "its number of tensors"), self.number("Q", "its number of keys")

    def check_count(self, count: int, things: str, least: int, most: int, what: str = "") -> None:
        """Could so many things of at least `least` bytes follow, and are they no more than `most`? Raises CheckpointError."""
        if count * least > self.file_bytes - self.at:
            self.refuse(what, f"has {count} {things}, says the header, for which {self.file_bytes - self.at} bytes are left")
        if count > most:
            self.refuse(what, f"has {count} {things}, {most} are allowed")

    def number(self, letter: str, what: str) -> Any:
        """One, by struct's letter. Raises CheckpointError."""
        form = f"<{letter}"
        return struct.unpack_from(form, self._data, self._take(struct.calcsize(form), what))[0]

    def numbers(self, letter: str, count: int, what: str) -> tuple[Any, ...]:
        """Several, by struct's letter. Raises CheckpointError."""
        form = f"<{count}{letter}"
        return struct.unpack_from(form, self._data, self._take(struct.calcsize(form), what))

    def text(self, what: str, most: int | None = None) -> str:
        """A length, at most `most`, and so many bytes of UTF-8. Raises CheckpointError."""
        length = self.number("Q", what)
        if most is not None and length > most:
            self.refuse(what, f"is a text of {length} bytes, {most} are allowed")
        try:
            return self._bytes(length, what).decode()
        except UnicodeDecodeError:
            self.refuse(what, "is not UTF-8")

    def value(self, kind: int, key: str, keep: bool) -> Any:
        """What a key stands for; None if it is passed over. Raises CheckpointError."""
        if kind == ARRAY:
            return self._array(self.number("I", key), key, keep)
        if kind == STRING and keep:
            return self.text(key)
        if kind == STRING:
            self._take(self.number("Q", key), key)
            return None
        self._check_kind(kind, key)
        value = self.number("B" if kind == BOOL else SCALARS[kind], key)
        return self._truth([value], key)[0] if kind == BOOL else value

    def _array(self, kind: int, key: str, keep: bool) -> list[Any] | None:
        if kind == ARRAY:
            self.refuse(key, "is an array of arrays, which llama.cpp does not read either")
        if kind != STRING:
            self._check_kind(kind, key)
        count = self.number("Q", key)
        letter = "B" if kind == BOOL else SCALARS.get(kind, "Q")  # strings have at least their lengths
        self.check_count(count, "elements", struct.calcsize(f"<{letter}"), MAX_ITEMS - self._items, key)
        self._items += count
        if kind == STRING:
            return self._strings(count, key, keep)
        if not keep:
            self._take(struct.calcsize(f"<{count}{letter}"), key)
            return None
        values = list(self.numbers(letter, count, key))
        return self._truth(values, key) if kind == BOOL else values

    def _strings(self, count: int, key: str, keep: bool) -> list[Any] | None:
        """In a loop of its own: a vocabulary has 100,000 of them."""
        data, at, found = self._data, self.at, []
        for number in range(count):
            if at + 8 > len(data):
                self._fill(at + 8, key)
            stop = at + 8 + LENGTH.unpack_from(data, at)[0]
            if stop > len(data):
                self._fill(stop, key)
            if keep:
                try:
                    found.append(data[at + 8 : stop].decode())
                except UnicodeDecodeError:
                    self.refuse(key, f"its element {number} is not UTF-8")
            at = stop
        self.at = at
        return found if keep else None

    def _truth(self, values: list[int], key: str) -> list[bool]:
        if max(values, default=0) > 1:
            self.refuse(key, f"holds the byte {max(values)} as true or false")
        return [value == 1 for value in values]

    def _check_kind(self, kind: int, key: str) -> None:
        if kind not in SCALARS:
            self.refuse(key, f"is of type {kind}, which no value has")

    def _bytes(self, count: int, what: str) -> bytearray:
        start = self._take(count, what)
        return self._data[start : self.at]

    def _take(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin; behind them is where reading goes on."""
        start, self.at = self.at, self.at + count
        if self.at > len(self._data):
            self._fill(self.at, what)
        return start

    def _fill(self, stop: int, what: str) -> None:
        """Have the bytes up to `stop`, if they may be there."""
        if stop > self.file_bytes:
            self.refuse(what, f"ends {stop - self.file_bytes} bytes behind the end of the file, which has {self.file_bytes}")
        if stop > MAX_BYTES:
            self.refuse(what, f"makes the header longer than the {MAX_BYTES} bytes that are allowed")
        while (have := len(self._data)) < stop:
            # as much again, so that a long header is not copied many times
            self._data += self._file.read(max(CHUNK, min(have, stop)))
            if len(self._data) == have:
                self.refuse(what, "the file ended while it was read")

    def refuse(self, what: str, why: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.name}: {what}{': ' * bool(what)}{why}")
