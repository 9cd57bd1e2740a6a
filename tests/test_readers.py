from __future__ import annotations

import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.synthetic import (
    GOLDEN,
    exact,
    quick,
    read_file,
    tiny,
    write_bin,
    write_index,
    write_model,
    write_pdparams,
    write_raw_safetensors,
    write_safetensors,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from ernie_quant import archs, jsonio
from ernie_quant.errors import CheckpointError, ConfigError, PlanError
from ernie_quant.readers import _pickle, read_header, torch_bin
from ernie_quant.sources import open_source
from ernie_quant.views import build, read
from ernie_quant.views import files as views_files

BF16 = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -0.125]], dtype=torch.bfloat16)
FORMATS = {"safetensors": write_safetensors, "pdparams": write_pdparams, "bin": write_bin}


def refusal(path: Path) -> str:
    """The one line that reading `path` is refused with."""
    with pytest.raises(CheckpointError) as error:
        read_file(path)
    line = str(error.value)
    assert line.startswith(path.name)
    assert "\n" not in line
    assert len(line) < 1000
    return line


# --- safetensors -----------------------------------------------------------------------------------------------------


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


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


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


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "is not a JSON object"),
        (b'{"a": 1, "b": 2, "a": 3}', "is not valid JSON: duplicate key 'a'"),
        (b'{"x": {"a": 1, "a": 1}}', "is not valid JSON: duplicate key 'a'"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "is nested too deep"),
        (b'{"a": ' * 100_000, "is nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"a": Infinity}', "is not valid JSON: Infinity is no JSON number"),
        (b'{"a": 1E400}', "is not valid JSON: 1E400 is no JSON number"),
        (b'{"\\udc00": 1}', "is not valid JSON: 'utf-8' codec can't encode"),
        (b'{"a": ["\\ud800"]}', "is not valid JSON: 'utf-8' codec can't encode"),
        (b"\xff", "is not valid JSON: 'utf-8' codec can't decode"),
        (b"[" + b"{}," * 625_000 + b"{}]", "is too large: 1250002 values, 1250000 are allowed"),
        (b'"' + b"x" * (32 << 20), "is too large: more than 33554432 bytes"),
    ],
)  # fmt: skip
def test_json_of_strangers_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CheckpointError) as error:
        jsonio.read_object(tmp_path / "a.json")
    assert reason in str(error.value)
    assert len(str(error.value)) < 200


def test_json_that_is_refused_for_nothing() -> None:
    assert jsonio.parse(b'{"a": ' + b"[" * 62 + b"]" * 62 + b"}")  # 63 levels and the number of the last one
    assert jsonio.parse(b'{"a": {"b": 1}, "b": {"b": [1.5, -0.0, null, true, "\\ud83d\\ude00"]}}')["b"]["b"][4] == "😀"
    assert jsonio.parse(b"9" * 4000) == int("9" * 4000)


@pytest.mark.parametrize("total", [2**70, -1, 1e300, None, "x", [], {}])
def test_the_total_size_of_an_index_is_not_believed(tmp_path: Path, total: Any) -> None:
    folder = write_model(tmp_path / "m", {}, {"a": BF16, "b": BF16}, shards=2)
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, total)
    checkpoint = open_source(folder)
    assert (checkpoint.nbytes, checkpoint.anomalies) == (24, ())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "not a weight file (.bin, .pdparams, .pt, .safetensors)" in refusal(tmp_path / "m.gguf")


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "m.safetensors")


# --- pdparams --------------------------------------------------------------------------------------------------------

STATE = {
    "bf16": BF16,
    "f16": torch.tensor([[1.0, -2.0]], dtype=torch.float16),
    "f32": torch.arange(3000, dtype=torch.float32).reshape(50, 60),  # longer than a text that is kept in memory
    "i64": torch.tensor([1, -1]),
    "latin": torch.arange(256, dtype=torch.uint8).repeat(20).reshape(20, 256),
}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pdparams_gives_what_unpickling_gives(tmp_path: Path, protocol: int) -> None:
    path = write_pdparams(tmp_path / "m.pdparams", STATE, protocol)
    loaded = pickle.loads(path.read_bytes())
    del loaded["StructuredToParameterName@@"]
    expected = {name: torch.from_numpy(a) for name, a in loaded.items()}
    expected["bf16"] = expected["bf16"].view(torch.bfloat16)
    assert exact(read_file(path)) == exact(expected) == exact(STATE)


@pytest.mark.parametrize("protocol", [2, 3])
def test_numpys_old_module_name_is_as_good_as_the_new_one(tmp_path: Path, protocol: int) -> None:
    path = write_pdparams(tmp_path / "m.pdparams", STATE, protocol)
    data = path.read_bytes()
    old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != data
    path.write_bytes(old)
    assert exact(read_file(path)) == exact(STATE)


def test_pdparams_of_paddle_itself_hold_what_its_safetensors_hold() -> None:
    for model in ("dense", "moe", "moe_mtp"):
        pickled = read_file(GOLDEN / model / "paddle_pdparams" / "model_state.pdparams")
        files = sorted((GOLDEN / model / "paddle").glob("*.safetensors"))
        assert exact(pickled) == exact({name: t for file in files for name, t in read_file(file).items()})


@pytest.mark.parametrize("protocol", [2, 3])
def test_split_arrays_are_joined(tmp_path: Path, protocol: int) -> None:
    path = write_pdparams(tmp_path / "m.pdparams", STATE, protocol, split_above=700)
    assert sum(b"@@." in op[1].encode() for op in pickletools.genops(path.read_bytes()) if isinstance(op[1], str)) >= 5
    assert exact(read_file(path)) == exact(STATE)
    extents = {ref.name: len(ref.extents) for ref in read_header(path)}
    assert extents["f32"] == 5  # 3000 elements in slices of 700
    assert extents["bf16"] == 1


def split_table(**changes: Any) -> dict[str, Any]:
    info = {"OriginShape": (2, 3), "slices": ["w@@.0", "w@@.1"]}
    table = {"w@@.0": np.zeros(4, "f4"), "w@@.1": np.zeros(2, "f4")}
    return {**table, **changes, "UnpackBigParamInfor@@": {"w": info | changes.pop("info", {})}}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (split_table(info={"slices": ["w@@.0", "w@@.2"]}), "'w': one of its 2 slices is not there"),
        (split_table(info={"slices": ["w@@.0", "w@@.0"]}), "'w': one of its 2 slices is not there"),
        (split_table(info={"slices": []}), "'w': one of its 0 slices is not there"),
        (split_table(w=np.zeros(6, "f4")), "or it is there whole"),
        (split_table(info={"OriginShape": (2, 4)}), "w: its slices do not add up to (2, 4)"),
        (split_table(info={"OriginShape": (-2, -3)}), "its shape is not a list of sizes"),
        (split_table(info={"OriginShape": 6}), "w: lacks OriginShape or slices"),
        (split_table(**{"w@@.1": np.zeros(2, "i4")}), "w: its slices have several dtypes"),
    ],
)
def test_slices_that_are_no_whole_are_refused(tmp_path: Path, table: dict[str, Any], reason: str) -> None:
    table.pop("info", None)
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps(table, 2))
    assert reason in refusal(tmp_path / "m.pdparams")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_column_major_arrays_are_read_as_what_they_mean(tmp_path: Path, protocol: int) -> None:
    w = np.asfortranarray(np.array([[1, 2, 3], [4, 5, 6]], "f4"))
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"w": w}, protocol))
    ref = read_header(tmp_path / "m.pdparams")[0]
    assert ref.fortran
    assert ref.spec.shape == (2, 3)
    assert read_file(tmp_path / "m.pdparams")["w"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_column_major_arrays_of_three_dimensions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"w": np.zeros((2, 3, 4), "f4", order="F")}, 4))
    assert "w: has 3 dimensions in column-major order" in refusal(tmp_path / "m.pdparams")


@pytest.mark.parametrize(("at", "count"), [(0, 9000), (0, 1), (4095, 3), (8999, 1), (4000, 3000)])
def test_any_part_of_the_text_that_protocol_2_makes_of_bytes(tmp_path: Path, at: int, count: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("ernie_quant.views.files.TEXT_BLOCK", 7)  # so that blocks end inside of characters
    data = np.random.default_rng(0).integers(0, 256, 9000, "u1")
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"w": data}, 2))
    ref = read_header(tmp_path / "m.pdparams")[0]
    assert ref.extents[0].stored > ref.extents[0].nbytes == 9000
    with views_files.Files() as files:
        assert read.read(build.leaf(ref), files, (at, at + count)).tolist() == data[at : at + count].tolist()


def test_text_that_holds_fewer_bytes_than_it_says_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.full(5000, 0xE9, "u1")}, 2)
    at = data.index("é".encode() * 5000)
    for lie in ("e" * 2, "ā", "\x80"):  # two characters for one, one that is not latin-1, one that is
        changed = bytearray(data)
        changed[at : at + 2] = lie.encode()
        (tmp_path / "m.pdparams").write_bytes(changed)
        if lie == "\x80":
            assert read_file(tmp_path / "m.pdparams")["w"][:2].tolist() == [0x80, 0xE9]
        else:
            assert "w: its text" in refusal(tmp_path / "m.pdparams")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/ernie-quant-was-here",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_wants_to_run_something_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "m.pdparams"
    path.write_bytes(pickle.dumps({"w": Evil()}, protocol))
    line = refusal(path)
    if protocol >= 2:
        assert "asks for 'posix.system', which is not on the list of harmless names" in line
    path.write_bytes(b"cos\nsystem\n(X\x04\0\0\0echotR.")
    assert "asks for 'os.system'" in refusal(path)
    assert not Path("/tmp/ernie-quant-was-here").exists()


def test_a_raw_paddle_tensor_is_refused_because_it_asks_for_eval(tmp_path: Path) -> None:
    (tmp_path / "m.pdparams").write_bytes(b"\x80\x04cbuiltins\neval\n\x8c\x01x\x85R.")
    assert "asks for 'builtins.eval'" in refusal(tmp_path / "m.pdparams")


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"", "ends in the middle"),
        (b"\x80\x04}", "ends in the middle"),
        (b"\x80", "ends in the middle"),
        (b".", "a stack that holds more than its result"),
        (b"}}.", "a stack that holds more than its result"),
        (b"(}.", "a stack that holds more than its result"),
        (b"0.", "takes from an empty stack"),
        (b"}(0.", "takes from an empty stack"),  # a mark is a floor
        (b"}(q\0.", "takes from an empty stack"),
        (b"u.", "closes a mark it never set"),
        (b"t.", "closes a mark it never set"),
        (b"h\x05.", "recalls what it never stored"),
        (b"j\xff\xff\xff\xff.", "recalls what it never stored"),
        (b"}r\xff\xff\xff\xffj\xff\xff\xff\xff0.", None),  # a high number in the memo costs nothing
        (b"X\xff\xff\xff\x7f", "claims a string of 2147483647 bytes in a file of"),
        (b"\x8d" + b"\xff" * 8, "claims a string of 18446744073709551615 bytes in a file of"),
        (b"B\xff\xff\xff\xff", "claims a string of 4294967295 bytes"),
        (b"\x8e" + b"\xff" * 7 + b"\0", "claims a string of 72057594037927935 bytes"),
        (b"\x8c\x01\xff.", "a name that is not UTF-8"),
        (b"c" + b"a" * 1000, "an overlong line"),
        (b"}K\x01K\x02s.", "a dict key that is not a string"),
        (b"}\x8c\x01\nNs.", r"the unprintable key '\n'"),
        (b"}(\x8c\x01aN\x8c\x01aNu.", "the key 'a' twice"),
        (b"}(\x8c\x01au.", "sets items of something that is no dict"),
        (b"]\x8c\x01aNs.", "sets items of something that is no dict"),
        (b"}Na.", "appends to something that is no list"),
        (b"}Nb.", "sets the state of something that is no object"),
        (b"})R.", "calls something that is not a name"),
        (b"cnumpy\nndarray\n}R.", "calls something that is not a name"),
        (b"NN\x93.", "asks for 'a computed name'"),
        (b"\x97.", r"uses the opcode b'\x97', which no state dict needs"),
        (b"].", "holds no dict of arrays"),
        (b"cnumpy\nndarray\n.", "holds no dict of arrays"),
        (b"}\x8c\x01w}s.", "w: is not an array"),
        (b"}\x8c\x01wcnumpy\nndarray\n)Rs.", "w: is not an array"),
    ],
)  # fmt: skip
def test_every_abuse_of_the_pickle_machine_is_refused(tmp_path: Path, pickled: bytes, reason: str | None) -> None:
    (tmp_path / "m.pdparams").write_bytes(pickled)
    if reason is None:
        assert read_header(tmp_path / "m.pdparams") == []
    else:
        assert reason in refusal(tmp_path / "m.pdparams")


def test_a_pickle_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pickle, "MAX_OPCODES", 1000)
    (tmp_path / "m.pdparams").write_bytes(b"N0" * 1000)
    assert "more than 1000 opcodes" in refusal(tmp_path / "m.pdparams")


def test_a_tuple_of_a_tuple_of_a_tuple_is_refused_and_not_unfolded(tmp_path: Path) -> None:
    doubled = b")" + b"q\0h\0\x86" * 60  # 2**60 empty tuples, in 300 bytes
    (tmp_path / "m.pdparams").write_bytes(b"}\x8c\x01w" + doubled + b"s.")
    assert "w: is not an array" in refusal(tmp_path / "m.pdparams")


@pytest.mark.parametrize("piece", [b"\x8c\x01a", b"C\0", b"X\x00\x02\0\0" + b"a" * 512, b"X\x01\x02\0\0" + b"a" * 513])
def test_texts_and_payloads_have_a_budget_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(_pickle, "MAX_STRING_BYTES", 100_000)
    (tmp_path / "m.pdparams").write_bytes(piece * 1000)
    assert "texts and payloads that take more than 100000 bytes of memory" in refusal(tmp_path / "m.pdparams")


def test_the_budget_of_texts_is_what_they_take(tmp_path: Path) -> None:
    """Emoji and text of one emoji take four bytes a character."""
    for text in (b"a" * 500, "ä".encode() * 250, "😀".encode() * 125, b"a" * 496 + "😀".encode()):
        with open(tmp_path / "m.pdparams", "wb") as file:
            file.write((b"X\xf4\x01\0\0" + text) * 4000 + b".")
        tracemalloc.start()
        with open(tmp_path / "m.pdparams", "rb") as file:
            machine = _pickle._Machine(file, "m.pdparams", 1 << 30, {})
            for _ in range(4000):
                machine.take(1)
                machine.stack.append(machine.string(machine.integer(4), True))
            used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert machine.string_bytes * 0.8 < used < machine.string_bytes * 1.1 + 100_000


@pytest.mark.parametrize("form", ["bin", "pdparams 2", "pdparams 3", "pdparams 4"])
def test_100_000_tensors_in_a_pickle_are_few_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(_pickle, "MAX_OPCODES", _pickle.MAX_OPCODES // 500)
    monkeypatch.setattr(_pickle, "MAX_STRING_BYTES", _pickle.MAX_STRING_BYTES // 500)
    kind, _, protocol = form.partition(" ")
    names = [f"ernie.layers.{i}.mlp.experts.{i}.up_gate_proj.weight" for i in range(100, 300)]
    state = dict.fromkeys(names, BF16) if kind == "pdparams" else {name: BF16.clone() for name in names}
    path = FORMATS[kind](tmp_path / f"m.{kind}", state, *([int(protocol)] if protocol else []))
    assert len(read_header(path)) == 200


@pytest.mark.parametrize(
    "nested", [b"N" + b"Q" * 100_000, b"N" + b"\x85" * 100_000, b"]" * 100_000 + b"a" * 99_999, b"(" * 100_000]
)
def test_what_is_nested_without_end_is_thrown_away_without_recursion(tmp_path: Path, nested: bytes) -> None:
    (tmp_path / "m.pdparams").write_bytes(nested + b".")
    assert "pickle ends with a stack" in refusal(tmp_path / "m.pdparams") or "holds no dict" in refusal(tmp_path / "m.pdparams")


@pytest.mark.parametrize("form", ["bin", "pdparams", "safetensors"])
def test_a_name_of_many_characters_is_refused(tmp_path: Path, form: str) -> None:
    path = FORMATS[form](tmp_path / f"m.{form}", {"x" * 501: BF16})
    assert "holds a tensor whose name has 501 characters: 'xxx" in refusal(path)
    assert read_file(FORMATS[form](path, {"x" * 500: BF16}))


@pytest.mark.parametrize("cut", [1, 40, 200, 1000])
def test_a_truncated_pdparams_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_pdparams(tmp_path / "m.pdparams", STATE)
    os.truncate(path, path.stat().st_size - cut)
    refusal(path)


@pytest.mark.parametrize("dtype", ["c8", ">f4", "U3", "O", "M8[s]", "f4,i4"])
def test_arrays_of_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps({"w": np.zeros(3, dtype)}, 4))
    assert "w: its dtype is none of u2, f2, f4" in refusal(tmp_path / "m.pdparams")


def test_an_array_of_another_size_than_its_shape_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.zeros((2, 3), "f4")}, 4)
    lie = data.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86")
    assert lie != data
    (tmp_path / "m.pdparams").write_bytes(lie)
    assert "w: F32 (2, 4) takes 32 bytes, the file holds 24" in refusal(tmp_path / "m.pdparams")


# --- .bin ------------------------------------------------------------------------------------------------------------


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


# --- whatever a file claims ------------------------------------------------------------------------------------------

# the costliest files that are known for each bound, built with as much of everything as it allows
COSTLY = {
    "names.safetensors": lambda: b"{" + b",".join('"%016d😀":0'.encode() % i for i in range(1_249_000)) + b"}",
    "objects.safetensors": lambda: b"{" + b",".join(b'"%010d":{"a":0}' % i for i in range(624_000)) + b"}",
    "text.safetensors": lambda: '{"a":"😀'.encode() + b"x" * ((32 << 20) - 100) + b'"}',
    "dicts.pdparams": lambda: b"}\x94" * 1_800_000,
    "tuples.pdparams": lambda: b"N" + b"\x85" * 3_600_000,
    "memo.pdparams": lambda: b"N" + b"\x94" * 3_600_000,
    "calls.pdparams": lambda: b"N" + b"Q" * 3_600_000,
    "payloads.pdparams": lambda: b"C\0\x94" * 1_200_000 + b"}\x94" * 600_000,
    "texts.pdparams": lambda: (b"X\xfc\1\0\0" + b"x" * 504 + "😀".encode()) * 73_000 + b"}" * 3_300_000,
    "keys.pdparams": lambda: b"X\xfe\1\0\0" + b"a" * 510 + b"q\0" + b"}h\0Ns" * 900_000,
    "members.bin": lambda: directory(b"PK\1\2" + bytes(24) + b"\5" + bytes(17) + b"%05x" % i for i in range(320_000)),
}  # fmt: skip


def directory(entries: Iterable[bytes]) -> bytes:
    """An archive that is nothing but a directory."""
    data = b"".join(entries)
    return data + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(data), 0, 0)


READ = """
import sys, time
from pathlib import Path
from ernie_quant.errors import CheckpointError
from ernie_quant.readers import read_header
peak_kb = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, start = peak_kb(), time.process_time()
try:
    read_header(Path(sys.argv[1]))
except CheckpointError as error:
    print((peak_kb() - before) // 1000, time.process_time() - start, len(str(error)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", COSTLY)
def test_memory_and_time_are_bounded_whatever_a_file_claims(tmp_path: Path, name: str) -> None:
    data = COSTLY[name]()
    (tmp_path / name).write_bytes(len(data).to_bytes(8, "little") + data if name.endswith(".safetensors") else data)
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / name], capture_output=True, text=True, check=True)
    megabytes, seconds, letters = map(float, done.stdout.split())
    print(f"{name}: {megabytes:.0f} MB, {seconds:.1f} s")
    assert megabytes < 600
    assert seconds < 20
    assert letters < 600


# --- errors and config.json --------------------------------------------------------------------------------------------


def test_an_error_of_a_million_problems_shows_50() -> None:
    error = PlanError("m: 1000000 problem(s)", [f"t{i}: is unknown" for i in range(1_000_000)])
    lines = str(error).split("\n")
    assert lines[:2] == ["m: 1000000 problem(s)", "  t0: is unknown"]
    assert lines[50:] == ["  t49: is unknown", "  … and 999950 more"]
    assert len(error.problems) == 1_000_000
    assert len(str(PlanError("m", ["x"] * 50)).split("\n")) == 51


def test_a_line_of_an_error_is_one_line_and_not_a_long_one() -> None:
    assert str(CheckpointError("a\nb\x1b[31m\ud800ü")) == r"a\nb\x1b[31m\ud800ü"
    long = "name " + "x" * 10_000_000 + ": is missing"
    for shown in (str(CheckpointError(long)), str(PlanError("m", [long])).split("\n")[1].strip()):
        assert len(shown) == 500
        assert shown.startswith("name xxx")
        assert " … xxx" in shown
        assert shown.endswith("xxx: is missing")
    assert len(str(CheckpointError("\n" * 10_000))) == 500


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 2**24}, "num_hidden_layers is 16777216, not a whole number from 1 to 4096"),
        ({"mlp_layer_types": [{}, []]}, "mlp_layer_types is not a list of 2 times 'dense' or 'sparse'"),
    ],
)
def test_a_config_of_unusual_values_is_refused(changes: dict[str, Any], reason: str) -> None:
    config, tensors = tiny(**{"num_hidden_layers": 2, **changes})
    with pytest.raises(ConfigError) as error:
        archs.find(config).name_map(config, list(tensors))
    assert str(error.value) == f"config.json: {reason}"


# --- properties ------------------------------------------------------------------------------------------------------

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    name = st.text("abcäλ😀._@0", min_size=1, max_size=8).filter(lambda n: "@@" not in n)
    names = draw(st.lists(name, max_size=4, unique=True))
    state = {}
    for name in names:
        shape = draw(st.lists(st.integers(1, 5), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        items = int(np.prod(shape)) * dtype.itemsize
        data = draw(st.binary(min_size=items, max_size=items))
        if dtype == torch.bool:
            data = bytes(byte & 1 for byte in data)
        state[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@quick(60)
@given(state=state_dicts())
def test_every_format_gives_back_what_was_written(folder: Path, state: dict[str, torch.Tensor]) -> None:
    assert exact(read_file(write_safetensors(folder / "m.safetensors", state))) == exact(state)
    assert exact(read_file(write_bin(folder / "m.bin", state))) == exact(state)
    matrices = {name: t for name, t in state.items() if t.ndim}  # numpy pickles a scalar as an array too, paddle has none
    for protocol in (2, 3, 4):
        assert exact(read_file(write_pdparams(folder / "m.pdparams", matrices, protocol))) == exact(matrices)


SMALL = {"a": BF16, "layers.0.w": torch.arange(12, dtype=torch.float32).reshape(3, 4), "ünï": torch.arange(5)}


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """A file with a few bytes changed, dropped, doubled or inserted."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at, count = draw(st.integers(0, len(data) - 1)), draw(st.integers(1, 8))
        match draw(st.sampled_from(("set", "set", "set", "insert", "drop", "copy", "end"))):
            case "set":
                data[at] = draw(st.one_of(st.sampled_from(b"\0\1\x7f\x80\xff0-9{}[]\"'.()tuRbqh"), st.integers(0, 255)))
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "drop":
                del data[at : at + count]
            case "copy":
                data[at:at] = data[at : at + count]
            case "end" if len(data) > count:
                del data[-count:]
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def reads_or_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        tensors = read_file(path)
    except CheckpointError as error:
        line = str(error)
        assert line.startswith(path.name)
        assert line.isprintable()
    else:
        assert sum(t.nbytes for t in tensors.values()) <= 10 * len(data)


def as_bytes(write: Any, suffix: str, **options: Any) -> bytes:
    """What a writer writes, for the damage strategies below."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return Path(write(Path(folder) / f"m{suffix}", SMALL, **options)).read_bytes()


@quick(400)
@given(data=damaged(as_bytes(write_safetensors, ".safetensors", metadata={"format": "pt"})))
def test_damaged_safetensors_read_or_are_refused(folder: Path, data: bytes) -> None:
    reads_or_is_refused(folder / "d.safetensors", data)


@st.composite
def damaged_headers(draw: st.DrawFn) -> bytes:
    """A header of the right length with values that no writer writes, and the data that belong to it."""
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 60), st.integers(), st.floats(), st.text(max_size=5),
        st.lists(st.one_of(st.integers(-2, 30), st.integers(), st.booleans(), st.floats()), max_size=4),
    )  # fmt: skip
    header: dict[str, Any] = {"a": entry(), "b": entry(shape=[2], dtype="BF16", offsets=[4, 8])}
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=3)))
        inner = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if isinstance(header.get(key), dict) and draw(st.booleans()):
            header[key] = {**header[key], inner: draw(values)}
        else:
            header[key] = draw(values)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + b"\0" * 8


@quick(300)
@given(data=damaged_headers())
def test_headers_of_strange_values_read_or_are_refused(folder: Path, data: bytes) -> None:
    reads_or_is_refused(folder / "h.safetensors", data)


@quick(400)
@given(
    data=st.sampled_from([2, 3, 4]).flatmap(lambda p: damaged(as_bytes(write_pdparams, ".pdparams", protocol=p, split_above=9)))
)
def test_damaged_pdparams_read_or_are_refused(folder: Path, data: bytes) -> None:
    reads_or_is_refused(folder / "d.pdparams", data)


@quick(300)
@given(data=damaged(as_bytes(write_bin, ".bin")))
def test_damaged_archives_read_or_are_refused(folder: Path, data: bytes) -> None:
    reads_or_is_refused(folder / "d.bin", data)


PIECES = [
    *_pickle.OPCODES, b"K\x01", b"h\0", b"h\1", b"q\0", b"q\1", b"\x8c\x01a", b"\x8c\x01b", b"C\x02xy", b"X\x01\0\0\0c",
    b"}\x8c\x01w",
    b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n",
    b"ccollections\nOrderedDict\n)R", b"\x8c\x02u2\x89\x88\x87R", b"\x8c\x15UnpackBigParamInfor@@",
]  # fmt: skip


@quick(500)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30))
def test_random_opcodes_read_or_are_refused(folder: Path, pieces: list[bytes]) -> None:
    reads_or_is_refused(folder / "o.pdparams", b"".join(pieces) + b".")
