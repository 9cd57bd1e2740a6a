"""The directory of a zip archive: which members there are and where, read without decompressing anything.

Python's own zipfile reads a directory of any size into memory and warns about odd ones. This one knows what torch.save
writes: no comment behind the directory, nothing before the archive. Format: APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import IO

from ernie_quant.checkpoint import Extent
from ernie_quant.errors import CheckpointError

MAX_DIRECTORY_BYTES = 16 << 20  # 150,000 members of torch.save's take 12 MB; the smallest entry has 46 bytes
END = struct.Struct("<4s4H2LH")  # signature, disks, entries (2x), directory: bytes, offset; comment's length
END64 = struct.Struct("<4sQ2H2L4Q")  # signature, own size, versions, disks, entries (2x), directory: bytes, offset
LOCATOR64 = struct.Struct("<4sLQL")  # signature, disk, offset of END64, disks
ENTRY = struct.Struct("<4s4x2H8x2L3H8xL")  # signature, flags, method, bytes: packed, plain; lengths: name, extra, comment; offset
LOCAL = struct.Struct("<4s22xHH")  # signature, …, lengths of name and extra field
OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")
NO_ARCHIVE = "not a zip archive as torch.save writes it since version 1.6"


@dataclass(frozen=True, slots=True)
class Member:
    """What the directory says of a member; nothing of it is true before `Archive.stored` has looked."""

    offset: int
    nbytes: int
    plain: bool  # neither compressed nor encrypted


@dataclass(frozen=True)
class Archive:
    """An open archive; `members` by their names in the folder that all of them are in."""

    file: IO[bytes]
    name: str
    size: int
    root: str
    members: dict[str, Member]

    def stored(self, member: str) -> Extent:
        """Where the bytes of a member lie. Raises CheckpointError."""
        found = self.members.get(f"{self.root}/{member}")
        if found is None:
            raise CheckpointError(f"{self.name}: has no {member}")
        if not found.plain:
            raise CheckpointError(f"{self.name}: {member} is compressed or encrypted; torch.save stores it as it is")
        full = f"{self.root}/{member}".encode()
        raw = _read(self.file, found.offset, LOCAL.size + len(full), self.size)
        if raw[:4] != b"PK\3\4" or raw[LOCAL.size :] != full or LOCAL.unpack(raw[: LOCAL.size])[1] != len(full):
            raise CheckpointError(f"{self.name}: {member}: its place in the archive holds something else")
        start = found.offset + len(raw) + LOCAL.unpack(raw[: LOCAL.size])[2]
        if start + found.nbytes > self.size:
            raise CheckpointError(f"{self.name}: {member}: ends at {start + found.nbytes}, the file has {self.size} bytes")
        return Extent(start, found.nbytes)


def open_archive(file: IO[bytes], name: str, size: int) -> Archive:
    """The directory of `file`, of `size` bytes. Raises CheckpointError."""
    members = _members(name, *_directory(file, name, size))
    roots = [root for root, _, rest in (m.partition("/") for m in members) if rest == "data.pkl"]
    if len(roots) != 1:
        raise CheckpointError(f"{name}: has {'no' if not roots else 'more than one'} data.pkl")
    return Archive(file, name, size, roots[0], members)


def _read(file: IO[bytes], offset: int, count: int, size: int) -> bytes:
    """`count` bytes at `offset`; fewer where the file has fewer, none where it has no such place."""
    if not 0 <= offset <= size:
        return b""
    file.seek(offset)
    return file.read(count)


def _directory(file: IO[bytes], name: str, size: int) -> tuple[bytes, int]:
    """The central directory, and how many members it should have."""
    end = _read(file, size - END.size, END.size, size)
    if end[:4] != b"PK\5\6":
        raise CheckpointError(f"{name}: {NO_ARCHIVE} (it does not end with a directory); save it again")
    _, _, _, _, entries, nbytes, offset, _ = END.unpack(end)
    at = size - END.size
    locator = _read(file, at - LOCATOR64.size, LOCATOR64.size, size)
    if locator[:4] == b"PK\6\7":  # torch.save writes it always, zip64 or not
        at = LOCATOR64.unpack(locator)[2]
        end64 = _read(file, at, END64.size, size)
        if end64[:4] != b"PK\6\6" or len(end64) != END64.size:
            raise CheckpointError(f"{name}: {NO_ARCHIVE} (its end points to something else); save it again")
        *_, entries, nbytes, offset = END64.unpack(end64)
    if offset + nbytes != at:
        raise CheckpointError(f"{name}: {NO_ARCHIVE} (its directory does not reach its end); save it again")
    if nbytes > MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"{name}: a directory of {nbytes} bytes is too large, {MAX_DIRECTORY_BYTES} are allowed")
    return _read(file, offset, nbytes, size), entries


def _members(name: str, directory: bytes, count: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = 0
    while at < len(directory):
        head = directory[at : at + ENTRY.size]
        if len(head) != ENTRY.size or head[:4] != b"PK\1\2":
            raise CheckpointError(f"{name}: {NO_ARCHIVE} (its directory is broken); save it again")
        _, flags, method, packed, nbytes, n, x, c, offset = ENTRY.unpack(head)
        at += ENTRY.size + n + x + c
        member = _member_name(name, directory[at - c - x - n : at - c - x])
        if member in members:
            raise CheckpointError(f"{name}: has the member {member[:200]!r} twice")
        nbytes, packed, offset = _wide([nbytes, packed, offset], directory[at - c - x : at - c])
        members[member] = Member(offset, nbytes, method == 0 and not flags & 1 and nbytes == packed)
    if at != len(directory) or len(members) != count:
        raise CheckpointError(f"{name}: {NO_ARCHIVE} (its directory has {len(members)} of {count} members); save it again")
    return members


def _member_name(name: str, raw: bytes) -> str:
    """A member's name, if it is one that stays in a folder; nothing is ever unpacked, but honest archives have no other."""
    member = raw.decode("utf-8", "replace")
    if not member.isprintable() or "\ufffd" in member or OUTSIDE.search(member):
        raise CheckpointError(f"{name}: has the member {member[:200]!r}, which is not a plain name")
    return member


def _wide(values: list[int], extra: bytes) -> list[int]:
    """Values of 32 bits, where they are too large replaced by those of 64 bits in the extra field."""
    while len(extra) >= 4:
        kind, count = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack(f"<{count // 8}Q", extra[4 : 4 + count // 8 * 8])) if len(extra) >= 4 + count else iter(())
            return [next(wide, value) if value == 0xFFFFFFFF else value for value in values]
        extra = extra[4 + count :]
    return values
