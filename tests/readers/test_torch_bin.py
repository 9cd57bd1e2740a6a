"""What torch.save writes: archives by hand, and archives that lie."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.reading import BF16, Evil, reads_or_is_refused, refusal
from helpers.synthetic import exact, read_file, write_bin

from ernie_quant.readers import read_header, torch_bin


def test_what_torch_saves_is_what_is_read(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "bf16": BF16,
        "f16": BF16.half(),
        "f32": BF16.float(),
        "parameter": torch.nn.Parameter(BF16.clone()),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "whole": base,
        "second half": base[12:].view(3, 4),  # shares its storage, from element 12 on
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(5, 0),
        "one column": torch.arange(4.0).reshape(1, 4).t(),
    }
    path = write_bin(tmp_path / "m.bin", state)
    assert exact(read_file(path)) == exact({name: t.detach() for name, t in state.items()})
    refs = {ref.name: ref for ref in read_header(path)}
    assert refs["second half"].extents[0].start == refs["whole"].extents[0].start + 48


def test_an_ordered_dict_with_metadata_is_a_state_dict_too(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    torch.save(linear.state_dict(), tmp_path / "m.bin")
    assert exact(read_file(tmp_path / "m.bin")) == exact(dict(linear.state_dict()))


def test_the_legacy_format_is_refused(tmp_path: Path) -> None:
    torch.save({"w": BF16}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    assert "not a zip archive as torch.save writes it since version 1.6" in refusal(tmp_path / "m.bin")


def rezip(path: Path, changed: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with members replaced, dropped (None) or compressed."""
    with zipfile.ZipFile(path) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in members.items():
            kept = changed.get(name.partition("/")[2], data)
            if kept is not None:
                new.writestr(name, kept)


def test_a_compressed_member_is_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "m.bin", {"w": torch.zeros(100)})
    rezip(path, {}, zipfile.ZIP_DEFLATED)
    assert "is compressed or encrypted; torch.save stores it as it is" in refusal(path)


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("data.pkl", None, "has no data.pkl"),
        ("data/0", None, "has no data/0"),
        ("data/0", b"\0" * 399, "w: ends at byte 400 of a storage of 399"),
        ("data.pkl", b"].", "holds no dict of tensors"),
        ("data.pkl", b"cos\nsystem\n(X\x04\0\0\0echotR.", "asks for 'os.system'"),
        ("data.pkl", b"}X\x01\0\0\0wNs.", "w: is not a tensor of a known kind"),
        ("byteorder", b"big", "big-endian"),
    ],
)
def test_a_changed_archive_is_refused(tmp_path: Path, member: str, data: bytes | None, reason: str) -> None:
    path = write_bin(tmp_path / "m.bin", {"w": torch.zeros(100)})
    rezip(path, {member: data})
    assert reason in refusal(path)


def archive(*members: tuple[str, bytes], wide: bool = False, count: int | None = None, comment: bytes = b"") -> bytes:
    """A stored archive by hand; `wide` puts sizes and places into extra fields as zip64 does."""
    data, directory = b"", b""
    for name, content in members:
        raw, offset = name.encode(), len(data)
        data += b"PK\3\4" + bytes(22) + struct.pack("<HH", len(raw), 0) + raw + content
        sizes = (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if wide else (len(content), len(content), offset)
        extra = b"xy\1\0z" + struct.pack("<2H3Q", 1, 24, len(content), len(content), offset) if wide else b""
        directory += b"PK\1\2" + bytes(16) + struct.pack("<2L3H8xL", *sizes[:2], len(raw), len(extra), 0, sizes[2]) + raw + extra
    entries = len(members) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries, entries, len(directory), len(data), len(comment))
    return data + directory + end + comment


PICKLED = (
    b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\n"
    b"X\1\0\0\x000X\3\0\0\0cpuK\1tQK\0K\1\x85K\1\x85\x89NtRs."
)
WHOLE = (("x/data.pkl", PICKLED), ("x/data/0", struct.pack("<f", 2.5)))


@pytest.mark.parametrize("wide", [False, True])
def test_an_archive_by_hand(tmp_path: Path, wide: bool) -> None:
    (tmp_path / "m.bin").write_bytes(archive(*WHOLE, wide=wide))
    assert read_file(tmp_path / "m.bin")["w"].tolist() == [2.5]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "/x/data/1", "../x", "x/../../y", "x/data/..", "..", "C:/x", "c:x", "C:\\x", "\\\\host\\x", "x\\..\\y",
        "a\nb", "a\0b",
    ],
)  # fmt: skip
def test_a_member_whose_name_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.bin").write_bytes(archive(*WHOLE, (name, b"")))
    assert f"has the member {name!r}, which is not a plain name" in refusal(tmp_path / "m.bin")


@pytest.mark.parametrize("key", ["../data.pkl", "/etc/passwd", "..", "", "x\n", "0/", "../../../../../../etc/passwd"])
def test_a_storage_is_a_member_of_the_archive_and_nothing_else(tmp_path: Path, key: str) -> None:
    raw = key.encode()
    pickled = PICKLED.replace(b"X\1\0\0\x000", b"X" + struct.pack("<L", len(raw)) + raw)
    (tmp_path / "m.bin").write_bytes(archive(("x/data.pkl", pickled), WHOLE[1]))
    assert f"has no data/{key.encode('unicode_escape').decode()}" in refusal(tmp_path / "m.bin")


BOMB = archive(("x/data.pkl", b"}."), ("x/data/0", b"\0" * 1000))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (archive(*WHOLE, WHOLE[1]), "has the member 'x/data/0' twice"),
        (archive(*WHOLE, ("y/data.pkl", b"}.")), "has more than one data.pkl"),
        (archive(WHOLE[1]), "has no data.pkl"),
        (archive(("x/a/data.pkl", PICKLED)), "has no data.pkl"),
        (archive(), "has no data.pkl"),
        (archive(("x/data.pkl", BOMB)), "pickle uses the opcode b'P'"),  # an archive in an archive
        (archive(*WHOLE, count=3), "its directory has 2 of 3 members"),
        (archive(*WHOLE, comment=b"hello"), "it does not end with a directory"),
        (b"MZ" + archive(*WHOLE), "its directory does not reach its end"),
        (archive(*WHOLE).replace(b"x/data/0", b"x/data/1", 1), "data/0: its place in the archive holds something else"),
        (archive(("x/data.pkl", PICKLED), ("x/data/0", b"\0\0\0")), "w: ends at byte 4 of a storage of 3"),
        (
            archive(*WHOLE).replace(struct.pack("<2L", 4, 4), struct.pack("<2L", 999, 999)),
            "data/0: ends at 1185, the file has 322 bytes",
        ),
        (archive(*WHOLE).replace(b"PK\1\2", b"PK\1\3"), "its directory is broken"),
        (archive(*WHOLE)[:-30] + archive(*WHOLE)[-22:], "its directory does not reach its end"),
    ],
)
def test_an_archive_that_lies_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "m.bin").write_bytes(data)
    assert reason in refusal(tmp_path / "m.bin")


def test_a_pickle_of_any_size_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_bin, "MAX_PICKLE_BYTES", len(PICKLED) - 1)
    (tmp_path / "m.bin").write_bytes(archive(*WHOLE))
    assert f"data.pkl has {len(PICKLED)} bytes, more than any state dict" in refusal(tmp_path / "m.bin")


def test_a_zip_bomb_is_refused_and_not_unpacked(tmp_path: Path) -> None:
    for member in ("x/data.pkl", "x/data/0", "x/byteorder"):
        with zipfile.ZipFile(tmp_path / "m.bin", "w") as new:
            for name, content in (*WHOLE, ("x/byteorder", b"little")):
                bomb = name == member
                new.writestr(name, b"\0" * 20_000_000 if bomb else content, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED)
        assert (tmp_path / "m.bin").stat().st_size < 40_000
        assert f"{member[2:]} is compressed or encrypted" in refusal(tmp_path / "m.bin")


def test_a_directory_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    nbytes = (16 << 20) + 1
    with open(path, "wb") as file:
        file.seek(nbytes)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, nbytes, 0)
        file.write(
            end64 + struct.pack("<4sLQL", b"PK\6\7", 0, nbytes, 1) + struct.pack("<4s4H2LH", b"PK\5\6", *[0xFFFF] * 4, 0, 0, 0)
        )
    assert "a directory of 16777217 bytes is too large, 16777216 are allowed" in refusal(path)


def test_a_global_outside_the_list_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"w": Evil()}, tmp_path / "m.bin")
    assert "asks for 'posix.system'" in refusal(tmp_path / "m.bin")
    torch.save({"step": Path("x")}, tmp_path / "m.bin")
    assert "asks for 'pathlib" in refusal(tmp_path / "m.bin")


def test_a_strided_tensor_is_refused(tmp_path: Path) -> None:
    write_bin(tmp_path / "m.bin", {"w": torch.zeros(4, 6)[:, ::2]})
    assert "w: strides (6, 2) of shape (4, 3): save it contiguous" in refusal(tmp_path / "m.bin")
    write_bin(tmp_path / "m.bin", {"w": torch.zeros(1, 1).expand(4, 3)})
    assert "w: strides (0, 0) of shape (4, 3)" in refusal(tmp_path / "m.bin")


def test_a_directory_of_an_archive_that_lies_about_places_is_refused(tmp_path: Path) -> None:
    data = write_bin(tmp_path / "m.bin", {"w": torch.zeros(3)}).read_bytes()
    for at in range(data.index(b"PK\x06\x06"), len(data) - 8):  # the end of the directory: its place, size and entries
        reads_or_is_refused(tmp_path / "m.bin", data[:at] + b"\xff" * 8 + data[at + 8 :])


def test_strides_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "m.bin", {"w": torch.zeros(2, 3)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    strides = b"K\x03K\x01\x86"
    assert strides in pickled
    rezip(path, {"data.pkl": pickled.replace(strides, b")" + b"q\xffh\xff\x86" * 60)})
    assert "w: shape, strides or offset are not at most 8 sizes" in refusal(path)
