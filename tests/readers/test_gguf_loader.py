"""What is read of GGUF is what llama.cpp's own loader reads, and nothing is read that it refuses."""

from __future__ import annotations

import ctypes as c
import importlib.util
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import _ggufs
from helpers.raw_gguf import file_of, tensor

from ernie_quant.dtypes import BLOCKS
from ernie_quant.errors import CheckpointError
from ernie_quant.readers import read_header, read_keys

MUTATIONS = 2000
SILENCE = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)  # for as long as the library may call it
Table = tuple[list[tuple[str, int, int]], int]  # name, first byte, bytes of the tensors; number of keys


class Params(c.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", c.c_bool), ("ctx", c.c_void_p))


@pytest.fixture(scope="module")
def loader() -> Callable[[Path], Table | None]:
    """`gguf_init_from_file`, by way of the one package that has all of llama.cpp in one library."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("pip install xllamacpp")
    library = c.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))

    def function(name: str, result: object, *arguments: object) -> Callable[..., object]:
        known = getattr(library, name)
        known.restype, known.argtypes = result, arguments
        return known  # type: ignore[no-any-return]

    function("ggml_log_set", None, c.c_void_p, c.c_void_p)(c.cast(SILENCE, c.c_void_p), None)
    begin, end = function("gguf_init_from_file", c.c_void_p, c.c_char_p, Params), function("gguf_free", None, c.c_void_p)
    tensors, keys = (function(f"gguf_get_n_{what}", c.c_int64, c.c_void_p) for what in ("tensors", "kv"))
    start = function("gguf_get_data_offset", c.c_size_t, c.c_void_p)
    name = function("gguf_get_tensor_name", c.c_char_p, c.c_void_p, c.c_int64)
    offset, size = (function(f"gguf_get_tensor_{what}", c.c_size_t, c.c_void_p, c.c_int64) for what in ("offset", "size"))

    def read(path: Path) -> Table | None:
        if not (file := begin(str(path).encode(), Params(True, None))):
            return None
        try:
            at: int = start(file)  # type: ignore[assignment]
            count: int = tensors(file)  # type: ignore[assignment]
            found = [(name(file, i).decode(), at + offset(file, i), size(file, i)) for i in range(count)]  # type: ignore
            return found, keys(file)  # type: ignore[return-value]
        finally:
            end(file)

    return read


def ours(path: Path) -> Table | None:
    try:
        return [(r.name, r.extents[0].start, r.extents[0].nbytes) for r in read_header(path)], len(read_keys(path))
    except CheckpointError:
        return None


def test_changed_files_are_read_as_the_loader_reads_them(tmp_path: Path, loader: Callable[[Path], Table | None]) -> None:
    files, path, outcomes = [file for _, file in _ggufs.files(tmp_path)], tmp_path / "m.gguf", Counter[str]()
    for number in range(MUTATIONS):
        rng = random.Random(f"loader-{number}")
        path.write_bytes(_ggufs.changed_gguf(rng, rng.choice(files)))
        here = ours(path)
        if here is None:
            outcomes["refused"] += 1
            continue
        assert loader(path) == here, number
        outcomes["read"] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize("dtype", BLOCKS)
def test_blocks_are_as_large_as_the_loader_says(tmp_path: Path, loader: Callable[[Path], Table | None], dtype: str) -> None:
    block, size = BLOCKS[dtype]
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of((), [tensor("w", (2 * block, 3), dtype)], bytes(-(-6 * size // 32) * 32)))
    found = loader(path)
    assert found is not None
    assert found == ours(path)
    assert found[0][0][2] == 6 * size
