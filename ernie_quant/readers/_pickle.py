"""Read a pickle as data: walk its opcodes, call nothing, keep large payloads as (offset, length).

`pickle.load` runs what a file says. Here are the opcodes that state dicts use, and what each does to a machine that builds
inert descriptions: a global becomes `Global`, a call becomes `Call`, bytes become `Payload`. Opcodes and their layout:
CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import IO, Any

from ernie_quant.readers._pickle_machine import Call, Global, Machine

# Of a state dict a tensor takes about 34 opcodes and 3 strings: room for 100,000 in one file (the 424B has 13,836 in all).
# Together they keep a walk below 10 s and 0.5 GB, whatever the file holds.
MAX_OPCODES = 3_500_000
MAX_STRING_BYTES = 160_000_000  # in memory: texts, and what is noted of payloads


def _build(m: Machine) -> None:
    state = m.pop()
    target = m.top()
    if not isinstance(target, Call):
        raise m.fail("pickle sets the state of something that is no object")
    if target.state is None:  # an ordered dict keeps its items; its attributes (`_metadata`) do not matter
        target.state = state


def _swap_call(m: Machine) -> None:
    args = m.pop()
    m.stack.append(m.call(m.pop(), args))


def _stack_global(m: Machine) -> None:
    name = m.pop()
    m.stack.append(m.named(m.pop(), name))


def _set_item(m: Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items(m.top(), [key, value])


def _set_items(m: Machine) -> None:
    items = m.since_mark()
    m.set_items(m.top(), items)


def _append(m: Machine) -> None:
    value = m.pop()
    m.append(m.top(), [value])


def _appends(m: Machine) -> None:
    items = m.since_mark()
    m.append(m.top(), items)


def _tuple(count: int) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        m.stack.append(tuple(reversed([m.pop() for _ in range(count)])))

    return op


def _push(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(read(m))


# fmt: off
OPCODES: dict[bytes, Callable[[Machine], Any]] = {
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
    m = Machine(file, name, size, {known: Global(known) for known in allowed}, MAX_STRING_BYTES)
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
