"""Read a pickle as data: walk its opcodes, call nothing, keep large payloads as (offset, length).

`pickle.load` runs what a file says. This machine knows the opcodes that state dicts use and builds inert
descriptions: a global becomes `Global`, a call becomes `Call`, bytes become `Payload`. Opcodes and their layout:
CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from sys import getsizeof
from typing import IO, Any

from ernie_quant.errors import CheckpointError

# Of a state dict a tensor takes about 34 opcodes and 3 strings: room for 100,000 in one file (the 424B has 13,836 in all).
# Together they keep a walk below 10 s and 0.5 GB, whatever the file holds.
MAX_OPCODES = 3_500_000
MAX_STRING_BYTES = 160_000_000  # in memory: texts, and what is noted of payloads
NUMBERS_BYTES = 64  # the two numbers of a payload
INLINE_BYTES = 512  # a longer text is a payload: it stays in the file


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle wants imported; it is one of a list, and never imported."""

    name: str


@dataclass(slots=True, eq=False)  # not frozen: there may be millions, and that takes twice the time
class Payload:
    """Bytes (or, for `text`, UTF-8) that stay in the file at `start`."""

    start: int
    nbytes: int
    text: bool


class Text(str):
    """A short text that remembers where it stands: protocol 2 stores the data of small arrays as text."""

    __slots__ = ("payload",)
    payload: Payload


@dataclass(slots=True, eq=False)
class Call:
    """What REDUCE, NEWOBJ and BINPERSID would have computed, with the state that BUILD would have set."""

    function: str
    args: Any
    state: Any = None


@dataclass(slots=True, eq=False)
class _Machine:
    file: IO[bytes]
    name: str
    size: int
    allowed: dict[str, Global]
    string_bytes: int = 0  # in memory
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def fail(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {why}; it was not loaded")

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail("pickle ends in the middle")
        return data

    def integer(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        text = self.file.readline(512)
        if not text.endswith(b"\n"):
            raise self.fail("pickle holds an overlong line")
        return text[:-1].decode("utf-8", "replace")

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise self.fail("pickle takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise self.fail("pickle closes a mark it never set")
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def string(self, count: int, text: bool) -> Any:
        start = self.file.tell()
        if count > self.size - start:
            raise self.fail(f"pickle claims a string of {count} bytes in a file of {self.size}")
        payload = Payload(start, count, text)
        if not text or count > INLINE_BYTES:
            self.file.seek(count, 1)
            self.charge(payload)
            return payload
        try:
            short = Text(self.take(count).decode("utf-8"))
        except UnicodeDecodeError:
            raise self.fail("pickle holds a name that is not UTF-8") from None
        short.payload = payload
        self.charge(payload, short)
        return short

    def charge(self, *kept: object) -> None:
        self.string_bytes += NUMBERS_BYTES + sum(map(getsizeof, kept))
        if self.string_bytes > MAX_STRING_BYTES:
            raise self.fail(f"pickle holds texts and payloads that take more than {MAX_STRING_BYTES} bytes of memory")

    def named(self, module: Any, name: Any) -> Global:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a computed name"
        if full not in self.allowed:
            raise self.fail(f"pickle asks for {full[:200]!r}, which is not on the list of harmless names")
        return self.allowed[full]

    def call(self, function: Any, args: Any) -> Call:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.fail("pickle calls something that is not a name")
        return Call(function.name, args)

    def set_items(self, target: Any, items: list[Any]) -> None:
        # the state of an ordered dict (a call) takes items too; torch saves state dicts that way
        table = target.state if isinstance(target, Call) else target
        if isinstance(target, Call) and table is None:
            table = target.state = {}
        if not isinstance(table, dict) or len(items) % 2:
            raise self.fail("pickle sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self.fail("pickle has a dict key that is not a string")
            if not key.isprintable():
                raise self.fail(f"pickle has the unprintable key {key[:200]!r}")
            if key in table:
                raise self.fail(f"pickle has the key {key[:200]!r} twice")
            table[key] = value

    def append(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            raise self.fail("pickle appends to something that is no list")
        target.extend(items)

    def remember(self, key: int) -> None:
        self.memo[key] = self.top()

    def recall(self, key: int) -> Any:
        if key not in self.memo:
            raise self.fail("pickle recalls what it never stored")
        return self.memo[key]


def _build(m: _Machine) -> None:
    state = m.pop()
    target = m.top()
    if not isinstance(target, Call):
        raise m.fail("pickle sets the state of something that is no object")
    if target.state is None:  # an ordered dict keeps its items; its attributes (`_metadata`) do not matter
        target.state = state


def _swap_call(m: _Machine) -> None:
    args = m.pop()
    m.stack.append(m.call(m.pop(), args))


def _stack_global(m: _Machine) -> None:
    name = m.pop()
    m.stack.append(m.named(m.pop(), name))


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.top(), [key, value])


def _set_items(m: _Machine) -> None:
    items = m.since_mark()
    m.set_items(m.top(), items)


def _append(m: _Machine) -> None:
    value = m.pop()
    m.append(m.top(), [value])


def _appends(m: _Machine) -> None:
    items = m.since_mark()
    m.append(m.top(), items)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def op(m: _Machine) -> None:
        m.stack.append(tuple(reversed([m.pop() for _ in range(count)])))

    return op


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(read(m))


# fmt: off
OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),                                    # PROTO
    b"\x95": lambda m: m.take(8),                                    # FRAME
    b"(":    lambda m: m.marks.append(len(m.stack)),                 # MARK
    b"0":    lambda m: m.pop(),                                      # POP
    b"N":    _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"}":    _push(lambda m: {}),
    b"]":    _push(lambda m: []),
    b")":    _push(lambda m: ()),
    b"K":    _push(lambda m: m.integer(1)),                          # BININT1
    b"M":    _push(lambda m: m.integer(2)),                          # BININT2
    b"J":    _push(lambda m: struct.unpack("<i", m.take(4))[0]),     # BININT
    b"\x8a": _push(lambda m: int.from_bytes(m.take(m.integer(1)), "little", signed=True)),  # LONG1
    b"G":    _push(lambda m: struct.unpack(">d", m.take(8))[0]),     # BINFLOAT
    b"\x8c": _push(lambda m: m.string(m.integer(1), True)),          # SHORT_BINUNICODE
    b"X":    _push(lambda m: m.string(m.integer(4), True)),          # BINUNICODE
    b"\x8d": _push(lambda m: m.string(m.integer(8), True)),          # BINUNICODE8
    b"C":    _push(lambda m: m.string(m.integer(1), False)),         # SHORT_BINBYTES
    b"B":    _push(lambda m: m.string(m.integer(4), False)),         # BINBYTES
    b"\x8e": _push(lambda m: m.string(m.integer(8), False)),         # BINBYTES8
    b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
    b"t":    _push(lambda m: tuple(m.since_mark())),                 # TUPLE
    b"c":    _push(lambda m: m.named(m.line(), m.line())),           # GLOBAL
    b"\x93": _stack_global,
    b"R":    _swap_call,                                             # REDUCE
    b"\x81": _swap_call,                                             # NEWOBJ
    b"b":    _build,
    b"s":    _set_item,
    b"u":    _set_items,
    b"a":    _append,
    b"e":    _appends,
    b"q":    lambda m: m.remember(m.integer(1)),                     # BINPUT
    b"r":    lambda m: m.remember(m.integer(4)),                     # LONG_BINPUT
    b"\x94": lambda m: m.remember(len(m.memo)),                      # MEMOIZE
    b"h":    _push(lambda m: m.recall(m.integer(1))),                # BINGET
    b"j":    _push(lambda m: m.recall(m.integer(4))),                # LONG_BINGET
    b"Q":    _push(lambda m: Call("persistent", m.pop())),           # BINPERSID
}
# fmt: on


def walk(file: IO[bytes], name: str, size: int, allowed: frozenset[str]) -> Any:
    """The one object that the pickle at the file's position describes. Raises CheckpointError."""
    m = _Machine(file, name, size, {known: Global(known) for known in allowed})
    for _ in range(MAX_OPCODES):
        opcode = m.take(1)
        if opcode == b".":
            if len(m.stack) != 1 or m.marks:
                raise m.fail("pickle ends with a stack that holds more than its result")
            return m.stack[0]
        action = OPCODES.get(opcode)
        if action is None:
            raise m.fail(f"pickle uses the opcode {opcode!r}, which no state dict needs")
        action(m)
    raise m.fail(f"pickle has more than {MAX_OPCODES} opcodes")
