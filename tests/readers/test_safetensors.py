"""safetensors: two tags of bf16, and every lie of a header."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from helpers.reading import BF16, entry, refusal
from helpers.synthetic import exact, read_file, write_raw_safetensors, write_safetensors

from ernie_quant import jsonio
from ernie_quant.errors import CheckpointError
from ernie_quant.readers import read_header
from ernie_quant.views import build, read
from ernie_quant.views import files as views_files


def test_bf16_is_the_same_under_both_of_its_tags(tmp_path: Path) -> None:
    new = write_safetensors(tmp_path / "new.safetensors", {"w": BF16}, bf16="BF16")
    old = write_safetensors(tmp_path / "old.safetensors", {"w": BF16}, bf16="U16")
    assert b'"U16"' in old.read_bytes()
    assert exact(read_file(old)) == exact(read_file(new)) == exact({"w": BF16})


def test_a_safetensors_file_by_hand(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "U8", "shape": [], "data_offsets": [8, 9]},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    }
    path = write_raw_safetensors(tmp_path / "m.safetensors", header, struct.pack("<2f", 1.5, -3) + b"\x07")
    refs = read_header(path)
    assert [ref.name for ref in refs] == ["a", "b"]  # in the order of the file, not of the header
    assert refs[1].extents[0].start == path.stat().st_size - 1
    assert read_file(path)["a"].tolist() == [[1.5], [-3.0]]
    assert read_file(path)["b"].item() == 7


LIES = {
    "overlap": ({"a": entry(), "b": entry(offsets=(3, 7))}, "b: starts at 3, overlaps"),
    "same place": ({"a": entry(), "b": entry()}, "b: starts at 0, overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(5, 9))}, "b: starts at 5, leaves a hole"),
    "hole at the start": ({"a": entry(offsets=(1, 5))}, "a: starts at 1, leaves a hole"),
    "past the end": ({"a": entry(shape=(9,), offsets=(0, 9))}, "truncated"),
    "longer than its tensors": ({"a": entry(shape=(3,), offsets=(0, 3))}, "longer than its tensors"),
    "backwards": ({"a": entry(offsets=(4, 0))}, "a: U8 (4,) takes 4 bytes, the header gives it 4 to 0"),
    "before the data": ({"a": entry(offsets=(-4, 0))}, "a: U8 (4,) takes 4 bytes, the header gives it -4 to 0"),
    "size": ({"a": entry(dtype="F32")}, "a: F32 (4,) takes 16 bytes, the header gives it 0 to 4"),
    "shape": ({"a": entry(shape=(2, 3))}, "a: U8 (2, 3) takes 6 bytes, the header gives it 0 to 4"),
    "product that wraps around": ({"a": entry(shape=(2**62, 4, 4), offsets=(0, 0))}, "a: U8"),
    "negative shape": ({"a": entry(shape=(-2, -2))}, "a: shape is not a list of at most 8 sizes"),
    "bool shape": ({"a": entry(shape=(True, 4))}, "a: shape is not a list"),
    "float shape": ({"a": entry(shape=(4.0,))}, "a: shape is not a list"),
    "text as shape": ({"a": entry(shape="4")}, "a: header entry lacks dtype, shape or data_offsets"),
    "nine dimensions": ({"a": entry(shape=(1,) * 8 + (4,))}, "a: shape is not a list of at most 8"),
    "bool offsets": ({"a": entry(shape=(1,), offsets=(False, True))}, "a: header entry lacks"),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, "a: header entry lacks"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 4]}}, "a: header entry lacks"),
    "no entry": ({"a": None}, "a: header entry lacks"),
    "unknown dtype": ({"a": entry(dtype="F4")}, "a: unknown dtype 'F4'"),
    "no object": (b"[]", "header is not a JSON object"),
    "no JSON": (b"{", "header is not valid JSON"),
    "duplicate": (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    "not UTF-8": (b'{"\xff": 1}', "header is not valid JSON: 'utf-8'"),
    "lone surrogate": (b'{"\\ud800": 1}', r"can't encode character '\ud800'"),
    "two lines": (b'{"a\\nerror: b": 1}', r"unprintable name 'a\nerror: b'"),
    "deep": (b'{"a":' + b"[" * 100_000, "header is nested too deep"),
    "deep and closed": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "header is nested too deep"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", "header is not valid JSON"),
    "NaN": (b'{"__metadata__": {"a": NaN}}', "header is not valid JSON: NaN is no JSON number"),
    "infinity": (b'{"__metadata__": {"a": -Infinity}}', "-Infinity is no JSON number"),
    "a number that is infinite": (b'{"__metadata__": {"a": 1e999}}', "1e999 is no JSON number"),
    "duplicate in the metadata": (b'{"__metadata__": {"a": "1", "a": "2"}}', "duplicate key 'a'"),
    "long name": ({"a" * 501: entry()}, "holds a tensor whose name has 501 characters: 'aaa"),
    "ten million names": (b'{"a":0,' + b'"b":0,' * 1_250_000, "header is too large: 1250002 values, 1250000 are allowed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_of_a_header_is_refused(tmp_path: Path, lie: str) -> None:
    header, reason = LIES[lie]
    assert reason in refusal(write_raw_safetensors(tmp_path / "m.safetensors", header, b"\0" * 4))


@pytest.mark.parametrize("length", [100, 1 << 32, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write_raw_safetensors(tmp_path / "m.safetensors", b"{}", length=length)
    assert f"header length {length} does not fit a file of 10 bytes" in refusal(path)


def test_a_large_header_is_not_even_read(tmp_path: Path) -> None:
    path = write_raw_safetensors(tmp_path / "m.safetensors", b"{}", length=(32 << 20) + 1)
    os.truncate(path, 1 << 40)  # a hole
    assert "header is too large: 33554433 bytes, 33554432 are allowed" in refusal(path)


@pytest.mark.parametrize("data", [b"", b"\2\0\0", b"\0" * 8])
def test_a_file_without_a_header_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    assert "header" in refusal(tmp_path / "m.safetensors")


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"w": BF16})
    ref = read_header(path)[0]
    os.truncate(path, path.stat().st_size - 1)
    with (
        views_files.Files() as files,
        pytest.raises(CheckpointError, match=r"m\.safetensors: w: the file ended while it was read"),
    ):
        read.read(build.leaf(ref), files)


def test_150_000_tensors_are_few_enough() -> None:
    one = (
        b'"model.layers.%d.mlp.experts.%d.up_gate_proj.weight_packed":{"dtype":"I32","shape":[8192,3584],"data_offsets":[%d,%d]}'
    )
    header = [one % (i, i, i, i) for i in range(1000)]
    bytes_each = len(b",".join(header)) / 1000
    values_each = sum(map(b",".join(header).count, (b",", b"[", b"{"))) / 1000
    assert 150_000 * bytes_each < jsonio.MAX_BYTES
    assert 150_000 * values_each < jsonio.MAX_VALUES
