"""Files of every format as hypothesis makes and damages them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reading import BF16, entry, reads_or_is_refused
from helpers.synthetic import exact, quick, read_file, write_bin, write_pdparams, write_safetensors
from hypothesis import given
from hypothesis import strategies as st

from ernie_quant.readers import _pickle

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
