"""The machine that a pickle is a program for, with stack, marks and memo; it builds inert descriptions and calls nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from sys import getsizeof
from typing import IO, Any

from ernie_quant.errors import CheckpointError

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
class Machine:
    """Where a walk is: the file, what lies on the stack and what is remembered."""

    file: IO[bytes]
    name: str
    size: int
    allowed: dict[str, Global]
    max_string_bytes: int  # in memory, as the next
    string_bytes: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def fail(self, why: str) -> CheckpointError:
        """What is raised for a pickle that is not believed."""
        return CheckpointError(f"{self.name}: {why}; it was not loaded")

    def take(self, count: int) -> bytes:
        """The next bytes of the file."""
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail("pickle ends in the middle")
        return data

    def integer(self, count: int) -> int:
        """The next bytes of the file as an unsigned number."""
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        """The next line of the file, without its end."""
        text = self.file.readline(512)
        if not text.endswith(b"\n"):
            raise self.fail("pickle holds an overlong line")
        return text[:-1].decode("utf-8", "replace")

    def pop(self) -> Any:
        """The value on top of the stack, off it."""
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise self.fail("pickle takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        """The value on top of the stack, which stays there."""
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        """All values above the last mark, off the stack with it."""
        if not self.marks:
            raise self.fail("pickle closes a mark it never set")
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def string(self, count: int, text: bool) -> Any:
        """A text that is short, or where in the file a longer one or bytes are."""
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
        """Count what is kept in memory against its limit."""
        self.string_bytes += NUMBERS_BYTES + sum(map(getsizeof, kept))
        if self.string_bytes > self.max_string_bytes:
            raise self.fail(f"pickle holds texts and payloads that take more than {self.max_string_bytes} bytes of memory")

    def named(self, module: Any, name: Any) -> Global:
        """A name of the list; nothing is imported."""
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a computed name"
        if full not in self.allowed:
            raise self.fail(f"pickle asks for {full[:200]!r}, which is not on the list of harmless names")
        return self.allowed[full]

    def call(self, function: Any, args: Any) -> Call:
        """A call of such a name; nothing is called."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.fail("pickle calls something that is not a name")
        return Call(function.name, args)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Keys and values, one after the other, into a dict."""
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
        """Items to the end of a list."""
        if not isinstance(target, list):
            raise self.fail("pickle appends to something that is no list")
        target.extend(items)

    def remember(self, key: int) -> None:
        """Keep the value on top of the stack under a number."""
        self.memo[key] = self.top()

    def recall(self, key: int) -> Any:
        """What is kept under a number."""
        if key not in self.memo:
            raise self.fail("pickle recalls what it never stored")
        return self.memo[key]
