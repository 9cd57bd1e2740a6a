from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.ggml import U16, Number
from ernie_quant.writers import ShardWriter, gguf

SPECS = {
    "experts": TensorSpec((2, 3, 64), "Q8_0"),
    "norm": TensorSpec((5,), "F32"),
    "linear": TensorSpec((3, 4), "BF16"),
}
KEYS = {
    "general.architecture": "ernie4_5",
    "a.count": 5,
    "a.eps": 1e-5,
    "a.flag": True,
    "texts": ("a", "é", ""),
    "scores": (1.0, -2.5),
    "types": (1, -2),
    "no": Number(3, U16),
}


def test_a_header_by_hand() -> None:
    layout = gguf.lay_out({"w": TensorSpec((2, 32), "Q8_0")}, {"k": 7})
    head = b"GGUF" + b"\3\0\0\0" + b"\1" + bytes(7) + b"\1" + bytes(7)
    head += b"\1" + bytes(7) + b"k" + b"\4\0\0\0" + b"\7\0\0\0"
    head += b"\1" + bytes(7) + b"w" + b"\2\0\0\0" + b"\x20" + bytes(7) + b"\2" + bytes(7) + b"\x08\0\0\0" + bytes(8)
    assert layout.head == head + bytes(-len(head) % 32)
    assert layout.starts == {"w": len(layout.head)}
    assert layout.nbytes == len(layout.head) + 96  # 68 bytes, up to a multiple of 32


def test_the_gguf_package_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf", reason="pip install '.[llama-cpp]'")
    blocks = torch.randint(0, 256, (2, 3, 68), dtype=torch.uint8)
    norm, linear = torch.randn(5), torch.randn(3, 4).bfloat16()
    path = tmp_path / "x.gguf"
    with ShardWriter(path, SPECS, gguf.lay_out(SPECS, KEYS), ["experts"]) as writer:
        writer.write("linear", linear)
        for number in (1, 0):
            writer.write("experts", blocks[number], 0, 0, number)
        writer.write("norm", norm)
        writer.close()
    read = reader.GGUFReader(path)
    found = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    assert found == {
        **KEYS,
        "a.eps": pytest.approx(1e-5),
        "texts": ["a", "é", ""],
        "scores": [1.0, -2.5],
        "types": [1, -2],
        "no": 3,
    }
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert list(tensors) == list(SPECS)
    assert tensors["experts"].shape.tolist() == [64, 3, 2]
    assert tensors["experts"].data.tobytes() == blocks.numpy().tobytes()
    assert tensors["norm"].data.tobytes() == norm.numpy().tobytes()
    assert {"w": linear.view(torch.uint8).flatten().tolist()} == {"w": tensors["linear"].data.flatten().tolist()}
    assert all(tensor.data_offset % 32 == 0 for tensor in read.tensors)
    assert path.stat().st_size % 32 == 0


def test_of_several_files_the_first_says_all_and_the_others_who_they_are() -> None:
    files = [{"a": TensorSpec((1,), "F32")}, {"b": TensorSpec((1,), "F32"), "c": TensorSpec((1,), "F32")}]
    first, second = (gguf.metadata_of(KEYS, files, number) for number in range(2))
    assert {key: value for key, value in first.items() if not key.startswith("split.")} == KEYS
    assert second == {"split.no": Number(1, U16), "split.count": Number(2, U16), "split.tensors.count": Number(3, 5)}
    assert gguf.metadata_of(KEYS, files[:1], 0) == KEYS


@pytest.mark.parametrize("dtype", ["Q4_0", "Q6_K", "IQ4_XS"])
def test_blocks_are_bytes_in_memory(dtype: str) -> None:
    spec = TensorSpec((3, 2, 512), dtype)
    assert spec.held.dtype == "U8"
    assert spec.held.shape[:2] == (3, 2)
    assert math.prod(spec.held.shape) == spec.nbytes == spec.held.nbytes
