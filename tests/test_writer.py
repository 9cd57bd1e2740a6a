from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.synthetic import exact, payload, quick, read_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ernie_quant import writers
from ernie_quant.checkpoint import TensorSpec
from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.disk import drop_partials, own_partial_of, write_file
from ernie_quant.dtypes import dtype_name, torch_dtype
from ernie_quant.planning.steps import Step
from ernie_quant.runtimes import vllm
from ernie_quant.writers import FileLayout, ShardWriter, Specs, joint_crc32, safetensors

SPECS = {"a": TensorSpec((4, 3), "F32"), "b": TensorSpec((2, 8), "BF16"), "c": TensorSpec((), "F32"), "d": TensorSpec((3,), "I8")}
TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "b": torch.arange(16).to(torch.bfloat16).reshape(2, 8),
    "c": torch.tensor(2.5),
    "d": torch.tensor([1, -1, 127], dtype=torch.int8),
}


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def safe_read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def writer(path: Path, specs: Specs, metadata: Mapping[str, str] | None = None, **options: Any) -> ShardWriter:
    return ShardWriter(path, specs, safetensors.lay_out(specs, metadata or {}), **options)


def write_all(path: Path) -> str:
    with writer(path, SPECS, {"format": "pt"}) as shard:
        for name, tensor in TENSORS.items():
            shard.write(name, tensor)
        return shard.close()


def test_a_header_by_hand() -> None:
    raw = safetensors.lay_out({"w": TensorSpec((2, 3), "BF16")}, {"format": "pt"}).head
    text = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    assert raw[8:] == text + b" " * 7  # 89 bytes, filled up to 96
    assert raw[:8] == (96).to_bytes(8, "little")
    assert safetensors.lay_out({}, {}).head[8:] == b"{}      "


def test_the_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    sha256 = write_all(tmp_path / "model.safetensors")
    assert exact(safe_read(tmp_path / "model.safetensors")) == exact(TENSORS) == exact(read_file(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_data_begin_at_a_multiple_of_eight_and_so_does_every_tensor_of_a_plan(tmp_path: Path) -> None:
    write_all(tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0

    codec = RoundToNearest(4, "channel")
    steps = []
    for i, shape in enumerate([(5, 32), (3, 64), (7, 24)]):  # scales of 10, 6 and 14 bytes
        name, spec = f"l{i}.up_proj.weight", TensorSpec(shape, "BF16")
        steps.append(Step(name, "mlp", None, spec, codec, vllm.parts(name, codec, spec), ()))  # type: ignore[arg-type]
    specs = safetensors.order({name: part.spec for step in steps for name, part in step.parts.items()})
    at = 0
    for name, spec in specs.items():
        itemsize = torch_dtype(spec.dtype).itemsize
        assert at % itemsize == 0, name
        at += spec.nbytes
    assert list(specs)[-3:] == [f"l{i}.up_proj.weight_scale" for i in range(3)]  # the odd ones are last


@dataclass(frozen=True, order=True)
class Slab:
    """`first` to `last` along an axis of the tensor `name`."""

    name: str
    axis: int
    first: int
    last: int


@st.composite
def shards(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], list[Slab]]:
    """Tensors, and slabs of their rows or columns in some order of writing."""
    tensors: dict[str, torch.Tensor] = {}
    slabs = []
    for i in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int64]))
        count = draw(st.integers(0, 255))
        tensors[f"t{i}"] = ((torch.arange(torch.Size(shape).numel()) + count) % 120).to(dtype).reshape(shape)
        axis = draw(st.integers(0, len(shape) - 1))
        edges = sorted({0, shape[axis]} | draw(st.sets(st.integers(0, shape[axis]))))
        slabs += [Slab(f"t{i}", axis, a, b) for a, b in itertools.pairwise(edges)]
    return tensors, draw(st.permutations(slabs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@quick(60)
@given(shard=shards())
def test_any_order_of_writing_gives_the_same_file_and_its_true_hash(
    folder: Path, shard: tuple[dict[str, torch.Tensor], list[Slab]]
) -> None:
    tensors, slabs = shard
    specs = {name: TensorSpec(tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()}
    hashes = set()
    for order in (slabs, sorted(slabs)):
        with writer(folder / "m.safetensors", specs) as out:
            for slab in order:
                whole = tensors[slab.name]
                out.write(slab.name, whole.narrow(slab.axis, slab.first, slab.last - slab.first), slab.axis, slab.first)
            hashes.add(out.close())
        assert exact(safe_read(folder / "m.safetensors")) == exact(tensors)
    assert hashes == {hashlib.sha256((folder / "m.safetensors").read_bytes()).hexdigest()}


def test_several_weights_in_one_stored_tensor(tmp_path: Path) -> None:
    """A stack of 3: each weight by itself, in slabs along its own axes, in any order; each has a checksum of its own."""
    stack = torch.arange(3 * 2 * 4, dtype=torch.int16).reshape(3, 2, 4)
    specs = {"experts": TensorSpec((3, 2, 4), "I16"), "b": SPECS["b"]}
    with writer(tmp_path / "m.safetensors", specs, stacks=["experts"]) as out:
        out.write("b", TENSORS["b"])
        out.write("experts", stack[2], index=2)
        out.write("experts", stack[0, :, 1:].contiguous(), 1, 1, index=0)
        out.write("experts", stack[1, 1:], 0, 1, index=1)
        out.write("experts", stack[0, :, :1].contiguous(), 1, 0, index=0)
        with pytest.raises(AssertionError, match="experts: written twice"):
            out.write("experts", stack[2], index=2)
        out.write("experts", stack[1, :1], 0, 0, index=1)
        checksums = [out.crc32([("experts", i)]) for i in range(3)]
        sha256 = out.close()
    assert exact(safe_read(tmp_path / "m.safetensors")) == exact({"experts": stack, "b": TENSORS["b"]})
    assert checksums == [joint_crc32([zlib.crc32(payload(weight))]) for weight in stack]
    assert sha256 == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()


def test_a_format_with_holes_has_zeros_in_them(tmp_path: Path) -> None:
    """Tensors at multiples of 32 behind a header of 5 bytes, in another order than they are written; padding at the end."""
    layout = FileLayout(b"head!", {"d": 32, "a": 64, "b": 128}, 192)
    with ShardWriter(tmp_path / "m", {name: SPECS[name] for name in "abd"}, layout) as out:
        for name in "bad":
            out.write(name, TENSORS[name])
        sha256 = out.close()
    data = (tmp_path / "m").read_bytes()
    expected = bytearray(192)
    for start, raw in ((0, b"head!"), (32, payload(TENSORS["d"])), (64, payload(TENSORS["a"])), (128, payload(TENSORS["b"]))):
        expected[start : start + len(raw)] = raw
    assert data == bytes(expected)
    assert sha256 == hashlib.sha256(data).hexdigest()


def test_a_tensor_that_was_not_written_or_written_twice_is_our_own_mistake(tmp_path: Path) -> None:
    def write(*tensors: torch.Tensor) -> None:
        with writer(tmp_path / "model.safetensors", SPECS) as shard:
            for tensor in tensors:
                shard.write("a", tensor)
            shard.close()

    a = TENSORS["a"]
    with pytest.raises(AssertionError, match=r"not written: \['b', 'c', 'd'\]"):
        write(a)
    with pytest.raises(AssertionError, match="a: written twice"):
        write(a, a)
    for wrong in (a.double(), a.reshape(3, 4), a.reshape(12)):
        with pytest.raises((AssertionError, IndexError), match=r"'a'|out of range"):
            write(wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with writer(tmp_path / "model.safetensors", SPECS) as shard:
            shard.write("a", TENSORS["a"])
            assert [p.name for p in tmp_path.iterdir()] == [shard.partial.name]
            assert shard.partial != own_partial_of(shard.path) != own_partial_of(shard.path)
            raise error

    before = open_files()
    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_disk_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_files()
    monkeypatch.setattr(writers.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_all(tmp_path / "model.safetensors")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with writer(path, SPECS) as shard:
        for name, tensor in TENSORS.items():
            shard.write(name, tensor)
            assert path.read_bytes() == b"old"
        shard.close()
    assert exact(safe_read(path)) == exact(TENSORS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the disk, in order."""
    found: list[str] = []
    fsync, replace, pwrite = os.fsync, os.replace, os.pwrite

    def spy_fsync(fd: int) -> None:
        found.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def spy_replace(source: Path, target: Path) -> None:
        found.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    def spy_pwrite(fd: int, data: Any, at: int) -> int:
        found.append("write")
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "pwrite", spy_pwrite)
    return found


def test_data_are_durable_before_the_name_is_and_the_name_before_we_go_on(tmp_path: Path, calls: list[str]) -> None:
    write_all(tmp_path / "m.safetensors")
    assert calls[:6] + calls[7:] == ["write"] * 5 + ["fsync file", "fsync folder"]
    assert re.fullmatch(r"m\.[0-9a-f]{8}\.safetensors\.partial -> m\.safetensors", calls[6])


def test_small_files_take_the_same_way(tmp_path: Path, calls: list[str]) -> None:
    assert write_file(tmp_path / "config.json", b"{}") == hashlib.sha256(b"{}").hexdigest()
    assert calls == ["fsync file", "config.json.partial -> config.json", "fsync folder"]
    assert json.loads((tmp_path / "config.json").read_text()) == {}


def test_short_writes_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(writers.os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    sha256 = write_all(tmp_path / "model.safetensors")
    assert exact(safe_read(tmp_path / "model.safetensors")) == exact(TENSORS)
    assert sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_partial_files_of_a_file_are_known_by_their_names(tmp_path: Path) -> None:
    """And those of others are left alone, as another process may be writing them."""
    mine, long, other = (tmp_path / f"{stem}.safetensors" for stem in ("model-1", "m" * 230, "model-10"))
    partials = {path: own_partial_of(path) for path in (mine, long, other)}
    assert all(len(partial.name) < 255 for partial in partials.values())
    for partial in (*partials.values(), tmp_path / "model-1.safetensors.partial", tmp_path / "model-1.gguf.partial"):
        partial.touch()
    drop_partials([mine, long, tmp_path / "none" / "model-1.safetensors"])
    assert {path.name for path in tmp_path.iterdir()} == {partials[other].name, "model-1.gguf.partial"}
