"""pdparams: what unpickling gives, without unpickling, and every abuse of the pickle machine."""

from __future__ import annotations

import os
import pickle
import pickletools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN
from helpers.reading import BF16, FORMATS, Evil, refusal
from helpers.synthetic import exact, read_file, write_pdparams

from ernie_quant.readers import _pickle, read_header
from ernie_quant.views import build, read
from ernie_quant.views import files as views_files

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
def test_a_module_of_numpy_is_known_by_its_old_and_its_new_name(tmp_path: Path, protocol: int) -> None:
    path = write_pdparams(tmp_path / "m.pdparams", STATE, protocol)
    data = path.read_bytes()
    names = [b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"]  # of numpy 1 and 2
    mine, other = names if names[0] in data else reversed(names)
    path.write_bytes(data.replace(mine, other))
    assert path.read_bytes() != data
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
            machine = _pickle.Machine(file, "m.pdparams", 1 << 30, {}, _pickle.MAX_STRING_BYTES)
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
