"""GGUF: what llama.cpp's loader demands is demanded, and every lie of a header is one line."""

from __future__ import annotations

import math
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults._mutations import changed_bytes
from helpers.raw_gguf import array, file_of, key, string, tensor, write

from ernie_quant.checkpoint import Extent, TensorSpec
from ernie_quant.dtypes import BLOCKS
from ernie_quant.errors import CheckpointError
from ernie_quant.ggml import BOOL, F32, I32, STRING, U32
from ernie_quant.readers import _gguf_head, gguf, read_header, read_keys
from ernie_quant.writers import gguf as writer

GOOD = file_of(
    [
        key("general.architecture", STRING, "ernie4_5"),
        key("a.count", U32, 7),
        key("a.eps", F32, 0.5),
        key("a.flag", BOOL, 1),
        key("long", 10, 2**63),
        key("small", 1, -3),
        array("tokens", STRING, ["<s>", "é", "", "日本"]),
        array("scores", F32, [0.5, -1.0]),
        array("types", I32, [1, -2, 3]),
        array("flags", BOOL, [1, 0]),
        array("none", STRING, []),
    ],
    [
        tensor("token_embd.weight", (32, 3), "Q8_0"),
        tensor("norm", (5,), "F32", 128),
        tensor("experts", (2, 3, 4), "BF16", 160),
    ],
    bytes(128 + 32 + 64),
)
KEYS = {
    "general.architecture": "ernie4_5",
    "a.count": 7,
    "a.eps": 0.5,
    "a.flag": True,
    "long": 2**63,
    "small": -3,
    "tokens": ["<s>", "é", "", "日本"],
    "scores": [0.5, -1.0],
    "types": [1, -2, 3],
    "flags": [True, False],
    "none": [],
}


def both(path: Path) -> None:
    read_header(path)
    read_keys(path)


def refusal(path: Path) -> str:
    """The one line, which is the same whoever reads what is wrong."""
    with pytest.raises(CheckpointError) as error:
        both(path)
    line = str(error.value)
    assert line.startswith(f"{path.name}: ")
    assert line.isprintable()
    assert len(line) <= 500
    return line.removeprefix(f"{path.name}: ")


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD)
    start = len(GOOD) - 224
    assert [(ref.name, ref.spec, ref.extents) for ref in read_header(path)] == [
        ("token_embd.weight", TensorSpec((3, 32), "Q8_0"), (Extent(start, 102),)),
        ("norm", TensorSpec((5,), "F32"), (Extent(start + 128, 20),)),
        ("experts", TensorSpec((4, 3, 2), "BF16"), (Extent(start + 160, 48),)),
    ]
    assert read_keys(path) == KEYS
    assert {name: type(value) for name, value in read_keys(path).items()} == {n: type(v) for n, v in KEYS.items()}


def test_the_padding_behind_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    for cut in range(17):
        (tmp_path / "m.gguf").write_bytes(GOOD[: len(GOOD) - cut])
        assert len(read_header(tmp_path / "m.gguf")) == 3
    (tmp_path / "m.gguf").write_bytes(GOOD[:-17])
    size = len(GOOD)
    assert refusal(tmp_path / "m.gguf") == f"truncated: the header promises {size - 16} bytes, the file has {size - 17}"
    (tmp_path / "m.gguf").write_bytes(GOOD + b"\0")
    said = f"longer than its tensors: the header promises {size} bytes, the file has {size + 1}"
    assert refusal(tmp_path / "m.gguf") == said


def test_a_file_of_keys_alone_is_the_first_of_some_split_models(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", [key("split.count", 2, 2)])
    assert read_header(path) == []
    assert read_keys(path) == {"split.count": 2}
    path.write_bytes(path.read_bytes() + bytes(32))
    assert "longer than its tensors" in refusal(path)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_another_alignment_is_what_the_file_says(tmp_path: Path, alignment: int) -> None:
    step = -(-16 // alignment) * alignment
    tensors = [tensor("a"), tensor("b", offset=step)]
    data = bytes(2 * step)
    path = write(tmp_path / "m.gguf", [key("general.alignment", U32, alignment)], tensors, data, alignment=alignment)
    extents = [ref.extents[0] for ref in read_header(path)]
    assert [extent.start % alignment for extent in extents] == [0, 0]
    assert extents[1].start - extents[0].start == step


def test_shapes_that_are_fine(tmp_path: Path) -> None:
    dims: list[Sequence[int]] = [(), (1,), (0,), (2, 0), (2, 1, 1, 1)]
    at, tensors = 0, []
    for number, shape in enumerate(dims):
        tensors.append(tensor(f"t{number}", shape, offset=at))
        at += -(-4 * math.prod(shape) // 32) * 32
    path = write(tmp_path / "m.gguf", (), tensors, bytes(at))
    assert [ref.spec.shape for ref in read_header(path)] == [tuple(shape[::-1]) for shape in dims]


@pytest.mark.parametrize("dtype", BLOCKS)
def test_every_block_of_ggml_is_read(tmp_path: Path, dtype: str) -> None:
    block, size = BLOCKS[dtype]
    data = bytes(-(-6 * size // 32) * 32)
    path = write(tmp_path / "m.gguf", (), [tensor("w", (2 * block, 3), dtype)], data)
    (ref,) = read_header(path)
    assert (ref.spec, ref.extents[0].nbytes) == (TensorSpec((3, 2 * block), dtype), 6 * size)
    path = write(path, (), [tensor("w", (2 * block - 1, 3), dtype)], data)
    said = f"w: {dtype} (3, {2 * block - 1}): its rows are no multiple of the block of {block}"
    assert refusal(path) == said
    assert refusal(write(path, (), [tensor("w", (), dtype)], data)).startswith(f"w: {dtype} (): its rows are no multiple")


READ = "which this program does not read; it reads F32, F16, Q4_0"
F = tensor("a")
FULL = bytes(32)
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file: it is empty"),
    "short": (b"GGU", "its magic: ends 1 bytes behind the end of the file, which has 3"),
    "magic": (b"GGML" + GOOD[4:], "is no GGUF file: it begins with b'GGML', not with b'GGUF'"),
    "zip": (b"PK\3\4" + GOOD[4:], r"is no GGUF file: it begins with b'PK\x03\x04'"),
    "version 1": (file_of(start=b"GGUF\1\0\0\0"), "is of version 1 of GGUF; only version 3 is read"),
    "version 2": (file_of(start=b"GGUF\2\0\0\0"), "is of version 2 of GGUF; only version 3 is read"),
    "version 4": (file_of(start=b"GGUF\4\0\0\0"), "is of version 4 of GGUF; only version 3 is read"),
    "big-endian": (file_of(start=b"GGUF\0\0\0\3"), "is a big-endian GGUF file; only little-endian ones are read"),
    "ends in the counts": (GOOD[:20], "its number of keys: ends 4 bytes behind the end of the file, which has 20"),
    # counts
    "keys": (file_of(counts=(0, 1)), "has 1 keys, says the header, for which 0 bytes are left"),
    "2**64 keys": (file_of(counts=(0, 2**64 - 1)), f"has {2**64 - 1} keys, says the header, for which 0 bytes are left"),
    "too many keys": (file_of([bytes(14)] * 10_001), "has 10001 keys, 10000 are allowed"),
    "tensors": (file_of(counts=(1, 0)), "has 1 tensors, says the header, for which 0 bytes are left"),
    "2**63 tensors": (file_of(counts=(2**63, 0)), f"has {2**63} tensors, says the header"),
    "too many tensors": (file_of((), [bytes(25)] * 100_001), "has 100001 tensors, 100000 are allowed"),
    # keys
    "key twice": (file_of([key("k", U32, 1), key("k", STRING, "x")]), "k: stands among the keys twice"),
    "no key": (file_of([key("", U32, 1)]), "the name of key 0: is '', which is none"),
    "two lines": (file_of([key("a\nerror: b", U32, 1)]), r"the name of key 0: is 'a\nerror: b', which is unprintable"),
    "long key": (file_of([key("k" * 65_536, U32, 1)]), "the name of key 0: is a text of 65536 bytes, 65535 are allowed"),
    "key past the end": (file_of([string("k" * 30, 2**60)]), "the name of key 0: is a text of"),
    "key not UTF-8": (file_of([key(b"\xff", U32, 1)]), "the name of key 0: is not UTF-8"),
    "type": (file_of([key("k", 13, b"\0\0")]), "k: is of type 13, which no value has"),
    "type -1": (file_of([key("k", 2**32 - 1, b"\0\0")]), "k: is of type 4294967295, which no value has"),
    "type of an array": (file_of([array("k", 13, [])]), "k: is of type 13, which no value has"),
    "array of arrays": (file_of([array("k", 9, [bytes(12)])]), "k: is an array of arrays, which llama.cpp does not read either"),
    "value past the end": (file_of([key("kkkkk", 12, b"\0")]), "kkkkk: ends 7 bytes behind the end of the file"),
    "text past the end": (file_of([key("k", STRING, string("x", 9))]), "k: ends 8 bytes behind the end of the file"),
    "text of 2**64": (file_of([key("k", STRING, string("x", 2**64 - 1))]), "k: ends 18446744073709551614 bytes behind the end"),
    "text not UTF-8": (file_of([key("k", STRING, string(b"\xff"))]), "k: is not UTF-8"),
    "half a character": (file_of([key("k", STRING, string(b"\xed\xa0\x80"))]), "k: is not UTF-8"),
    "truth of 2": (file_of([key("k", BOOL, b"\2")]), "k: holds the byte 2 as true or false"),
    "truths of 2": (file_of([array("k", BOOL, [0, 1, b"\2"])]), "k: holds the byte 2 as true or false"),
    "long array": (file_of([array("k", U32, [1], 2)]), "k: has 2 elements, says the header, for which 4 bytes are left"),
    "array of 2**64": (file_of([array("k", 0, [], 2**64 - 1)]), f"k: has {2**64 - 1} elements, says the header, for which 0"),
    "texts of 2**61": (file_of([array("k", STRING, [], 2**61)]), f"k: has {2**61} elements, says the header, for which 0"),
    "many elements": (file_of([array("k", 0, [bytes(3_000_001)], 3_000_001)]), "k: has 3000001 elements, 3000000 are allowed"),
    "many in all": (
        file_of([array(k, 0, [bytes(2_000_000)], 2_000_000) for k in "kl"]),
        "l: has 2000000 elements, 1000000 are allowed",
    ),
    "an element past the end": (
        file_of([array("k", STRING, ["x", string("y", 2)])]),
        "k: ends 1 bytes behind the end of the file",
    ),
    "an element not UTF-8": (file_of([array("k", STRING, ["x", string(b"\xff")])]), "k: its element 1 is not UTF-8"),
    # alignment
    "alignment 0": (file_of([key("general.alignment", U32, 0)]), "general.alignment: is 0, not a power of two of 32 bits"),
    "alignment 24": (file_of([key("general.alignment", U32, 24)]), "general.alignment: is 24, not a power of two"),
    "alignment u64": (file_of([key("general.alignment", 10, 32)]), "general.alignment: is 32, not a power of two of 32 bits"),
    "alignment text": (file_of([key("general.alignment", STRING, "32")]), "general.alignment: is '32', not a power of two"),
    "alignments": (file_of([array("general.alignment", U32, [32])]), "general.alignment: is [32], not a power of two"),
    # tensors
    "tensor twice": (file_of((), [F, tensor("a", offset=32)], bytes(64)), "a: stands in the table twice"),
    "name of 64": (file_of((), [tensor("a" * 64)], FULL), "the name of tensor 0: is a text of 64 bytes, 63 are allowed"),
    "name of 64 in 32": (file_of((), [tensor("é" * 32)], FULL), "the name of tensor 0: is a text of 64 bytes, 63 are allowed"),
    "no name": (file_of((), [tensor("")], FULL), "the name of tensor 0: is '', which is none"),
    "NUL": (file_of((), [tensor("a\0b")], FULL), r"the name of tensor 0: is 'a\x00b', which is unprintable"),
    "name not UTF-8": (file_of((), [tensor(b"\xc0")], FULL), "the name of tensor 0: is not UTF-8"),
    "five dimensions": (file_of((), [tensor("a", (1,) * 5)], FULL), "a: has 5 dimensions, more than 4"),
    "2**32 dimensions": (file_of((), [string("a") + b"\xff" * 40], FULL), "a: has 4294967295 dimensions, more than 4"),
    "table past the end": (file_of((), [F[:-4]], alignment=1), "a: ends 4 bytes behind the end of the file"),
    "IQ2_XXS": (file_of((), [tensor("a", (256,), "IQ2_XXS")], FULL), f"a: is IQ2_XXS (type 16), {READ}"),
    "TQ1_0": (file_of((), [tensor("a", (256,), "TQ1_0")], FULL), f"a: is TQ1_0 (type 34), {READ}"),
    "unknown type": (file_of((), [tensor("a", (256,), 999)], FULL), f"a: is type 999, {READ}"),
    "overflow": (
        file_of((), [tensor("a", (2**32, 2**31, 4))], FULL),
        "a: its shape (4, 2147483648, 4294967296) has more elements than can be counted",
    ),
    "overflow of nothing": (file_of((), [tensor("a", (0, 2**63))], FULL), f"a: its shape ({2**63}, 0) has more elements"),
    "large": (file_of((), [tensor("a", (2**40,))], FULL), "truncated: the header promises 4398046511"),
    "not at 0": (file_of((), [tensor("a", offset=32)], bytes(64)), "a: starts at 32, leaves a hole before it: it should start"),
    "overlap": (file_of((), [F, tensor("b", offset=16)], bytes(64)), "b: starts at 16, overlaps the tensor before it"),
    "same place": (file_of((), [F, tensor("b")], bytes(64)), "b: starts at 0, overlaps the tensor before it: it should start"),
    "hole": (file_of((), [F, tensor("b", offset=64)], bytes(96)), "b: starts at 64, leaves a hole before it"),
    "other order": (file_of((), [tensor("b", offset=32), F], bytes(64)), "b: starts at 32, leaves a hole before it"),
    "offset 2**64": (file_of((), [tensor("a", offset=2**64 - 32)], FULL), f"a: starts at {2**64 - 32}, leaves a hole"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_of_a_header_is_refused(tmp_path: Path, lie: str) -> None:
    data, said = LIES[lie]
    (tmp_path / "m.gguf").write_bytes(data)
    assert refusal(tmp_path / "m.gguf").startswith(said)


def test_a_header_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", [key("k", STRING, string(b"", 1 << 40))])
    os.truncate(path, 1 << 41)  # a hole
    assert refusal(path) == "k: makes the header longer than the 67108864 bytes that are allowed"
    path = write(path, [key("a", U32, 1), array("k", STRING, [string(b"", 1 << 40)])])
    os.truncate(path, 1 << 41)
    assert refusal(path) == "k: makes the header longer than the 67108864 bytes that are allowed"


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert refusal(tmp_path / "pipe.gguf") == "is no GGUF file: it is empty"
    (tmp_path / "folder.gguf").mkdir()
    assert refusal(tmp_path / "folder.gguf") == "cannot be read: Is a directory"
    assert refusal(tmp_path / "gone.gguf") == "cannot be read: No such file or directory"


def test_every_beginning_of_a_file_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD) - 224 + 1):
        (tmp_path / "m.gguf").write_bytes(GOOD[:length])
        assert refusal(tmp_path / "m.gguf")


# --- real sizes ------------------------------------------------------------------------------------------------------


def test_the_header_of_a_21b_takes_no_time(tmp_path: Path) -> None:
    """103,424 tokens, and the tensors of 28 layers; `read_header` makes nothing of the tokens."""
    tokens = [f"▁token{i}" for i in range(103_424)]
    keys = {"tokens": tuple(tokens), "scores": tuple(map(float, range(103_424))), "types": (1,) * 103_424}
    specs = {f"blk.{i}.{name}.weight": TensorSpec((64,), "F32") for i in range(28) for name in "abcdefghijkl"}
    layout = writer.lay_out(specs, keys)
    path = tmp_path / "m.gguf"
    path.write_bytes(layout.head)
    os.truncate(path, layout.nbytes)
    start = time.process_time()
    refs = read_header(path)
    assert time.process_time() - start < 0.5
    tracemalloc.start()
    read_header(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {ref.name: ref.extents[0].start for ref in refs} == layout.starts
    assert most < 3 * len(layout.head)
    start = time.process_time()
    found = read_keys(path)
    assert time.process_time() - start < 0.5
    assert found == {"tokens": tokens, "scores": list(keys["scores"]), "types": [1] * 103_424}


# --- another writer --------------------------------------------------------------------------------------------------


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    package: Any = pytest.importorskip("gguf", reason="pip install '.[llama-cpp]'")
    path = tmp_path / "m.gguf"
    out = package.GGUFWriter(path, "ernie4_5")
    out.add_uint32("a.count", 3)
    out.add_float32("a.eps", 0.25)
    out.add_bool("a.flag", False)
    out.add_array("tokens", ["a", "é"])
    out.add_array("scores", [0.5, -1.5])
    out.add_array("types", [1, 2])
    matrix = np.arange(64, dtype=np.float32).reshape(2, 32)
    blocks = package.quants.quantize(matrix, package.GGMLQuantizationType.Q8_0)
    out.add_tensor("matrix", matrix)
    out.add_tensor("blocks", blocks, raw_dtype=package.GGMLQuantizationType.Q8_0)
    out.add_tensor("half", np.ones((3, 4, 5), np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    refs = {ref.name: ref for ref in read_header(path)}
    assert {name: ref.spec for name, ref in refs.items()} == {
        "matrix": TensorSpec((2, 32), "F32"),
        "blocks": TensorSpec((2, 32), "Q8_0"),
        "half": TensorSpec((3, 4, 5), "F16"),
    }
    extent = refs["blocks"].extents[0]
    assert path.read_bytes()[extent.start :][: extent.nbytes] == blocks.tobytes()
    found = read_keys(path)
    assert found["general.architecture"] == "ernie4_5"
    assert [found[name] for name in ("a.count", "a.eps", "a.flag")] == [3, 0.25, False]
    assert [found[name] for name in ("tokens", "scores", "types")] == [["a", "é"], [0.5, -1.5], [1, 2]]


def test_names_and_numbers_of_types_are_those_of_the_gguf_package() -> None:
    package: Any = pytest.importorskip("gguf", reason="pip install '.[llama-cpp]'")
    theirs = {int(kind): kind.name for kind in package.GGMLQuantizationType}
    ours = {**gguf.UNREAD, **gguf.DTYPES}
    assert {number: ours.get(number) for number in theirs} == theirs
    assert not gguf.UNREAD.keys() & gguf.DTYPES.keys()


# --- changed files ---------------------------------------------------------------------------------------------------


def changed(rng: random.Random) -> bytes:
    """The good file with 1 to 3 changes, most of them in its header."""
    data = GOOD
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = changed_bytes(rng, data, 0, len(GOOD) - 224 if rng.random() < 0.9 else None)
    return data


def test_changed_files_are_read_or_refused(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "m.gguf", {"read": 0, "refused": 0}
    for number in range(1500):
        data = changed(random.Random(f"gguf-{number}"))
        path.write_bytes(data)
        start = time.process_time()
        try:
            refs, keys = read_header(path), read_keys(path)
        except CheckpointError:
            outcomes["refused"] += 1
            refusal(path)
        else:
            outcomes["read"] += 1
            ends = [extent.start + extent.nbytes for ref in refs for extent in ref.extents]
            assert all(0 < end <= len(data) for end in ends)
            assert [ref.spec.nbytes for ref in refs] == [ref.extents[0].nbytes for ref in refs]
            assert all(name and name.isprintable() for name in (*keys, *(ref.name for ref in refs)))
        assert time.process_time() - start < 0.5
    assert min(outcomes.values()) > 100


def test_chunks_are_no_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that is read a few bytes at a time is the same."""
    monkeypatch.setattr(_gguf_head, "CHUNK", 7)
    path = tmp_path / "m.gguf"
    path.write_bytes(GOOD)
    assert [ref.name for ref in read_header(path)] == ["token_embd.weight", "norm", "experts"]
    assert read_keys(path) == KEYS
    assert struct.unpack("<Q", GOOD[8:16]) == (3,)
