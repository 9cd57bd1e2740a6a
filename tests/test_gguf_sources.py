"""GGUF as a source: a file, the parts of one, a folder; and what is said where it is none, or not the only one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Command
from helpers.raw_gguf import file_of, key, tensor
from helpers.synthetic import write_bin, write_safetensors

from ernie_quant.checkpoint import TensorSpec
from ernie_quant.errors import CheckpointError, ConfigError, MissingFileError
from ernie_quant.ggml import I32, STRING, U16, U32
from ernie_quant.sources import open_source
from ernie_quant.sources.parts import Model, models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 130\n"
Q4, PARTS = "X-Q4_K_M.gguf", [f"X-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def config_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys as they are, and how many tensors they were read with."""

    def keys_and_tensors(keys: Mapping[str, object], tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
        if "general.architecture" not in keys:
            raise ConfigError("general.architecture is missing")
        return {**keys, "tensors": len(tensors)}

    monkeypatch.setattr("ernie_quant.archs._gguf.config_of", keys_and_tensors)


ARCH = key("general.architecture", STRING, "ernie4_5")


def put(folder: Path, name: str = Q4, *keys: bytes, tensors: tuple[str, ...] = ("a", "b"), arch: bool = True) -> Path:
    """Tensors of a block each."""
    table = [tensor(t, (32,), "Q8_0", 64 * i) for i, t in enumerate(tensors)]
    (folder / name).write_bytes(file_of([*([ARCH] if arch else []), *keys], table, bytes(64 * len(table))))
    return folder / name


def split(number: int, count: int = 3, tensors: int = 3) -> list[bytes]:
    return [key("split.no", U16, number), key("split.count", U16, count), key("split.tensors.count", I32, tensors)]


def put_parts(folder: Path) -> list[Path]:
    return [put(folder, name, *split(n), tensors=(f"t{n}",), arch=n == 0) for n, name in enumerate(PARTS)]


def refusal(source: Path, **more: bool) -> str:
    with pytest.raises(CheckpointError) as error:
        open_source(source, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- one file --------------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_with_one_are_the_same_checkpoint(tmp_path: Path) -> None:
    file = put(tmp_path, Q4, key("a.count", U32, 7))
    (tmp_path / "tokenizer.json").write_text("{}")
    for source in (file, tmp_path):
        found = open_source(source)
        assert (found.folder, list(found.refs), list(found.ranks[0].files)) == (tmp_path, ["a", "b"], [file])
        assert found.config == {
            "general.architecture": "ernie4_5",
            "a.count": 7,
            "tensors": 2,
            "quantization_config": {"quant_method": "gguf", "types": {"a": "Q8_0", "b": "Q8_0"}},
        }
        assert found.refs["b"].extents[0].start == file.stat().st_size - 64
        assert [p.name for p in found.extra_files] == ["tokenizer.json"]
        assert (found.anomalies, found.notes, found.others) == ((), (), ())


def test_a_file_of_several_is_opened_by_its_name_and_the_others_are_named(tmp_path: Path) -> None:
    put(tmp_path)
    put(tmp_path, "X-Q8_0.gguf", tensors=("a",))
    put(tmp_path, "mmproj-X.gguf")
    put_parts(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds 3 models; open the file of one, not the folder: {PARTS[0]} (3 files), {Q4}, X-Q8_0.gguf"
    )
    found = open_source(tmp_path / "X-Q8_0.gguf")
    assert list(found.refs) == ["a"]
    unread = ", ".join([*PARTS, Q4, "mmproj-X.gguf"])
    assert found.notes == (f"not read and not carried along: {unread}",)


@pytest.mark.parametrize("odd", ["mmproj-X-f16.gguf", "X.imatrix.gguf", "IMatrix.gguf"])
def test_files_that_are_no_models_stand_in_nobodys_way(tmp_path: Path, odd: str) -> None:
    put(tmp_path)
    put(tmp_path, odd)
    found = open_source(tmp_path)
    assert list(found.ranks[0].files) == [tmp_path / Q4]
    assert found.notes == (f"not read and not carried along: {odd}",)
    (tmp_path / Q4).unlink()
    assert refusal(tmp_path) == (
        f"config.json: named by the checkpoint, but is not there; {odd} has another name or format than those that are read"
    )


@pytest.mark.parametrize("kind", ["mmproj", "adapter", "imatrix"])
def test_a_file_that_says_that_it_is_no_model_is_refused(tmp_path: Path, kind: str) -> None:
    put(tmp_path, Q4, key("general.type", STRING, kind))
    assert refusal(tmp_path / Q4) == f"{Q4}: is no model; its general.type is {kind!r}"
    put(tmp_path, Q4, key("general.type", STRING, "model"))
    assert list(open_source(tmp_path).refs) == ["a", "b"]


def test_a_config_beside_it_is_not_read_and_a_note_says_so(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "config.json").write_text("no JSON")
    assert open_source(tmp_path).notes == (f"config.json: is not read; the keys of {Q4} say what the model is",)


def test_the_architecture_is_the_keys_business(tmp_path: Path) -> None:
    put(tmp_path, arch=False)
    with pytest.raises(ConfigError, match=r"general\.architecture is missing"):
        open_source(tmp_path / Q4)


def test_what_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.gguf") == "gone.gguf: named by the command, but is not there"
    assert refusal(tmp_path / "gone" / "x.gguf") == f"{tmp_path}/gone/x.gguf: there is no such file"
    (tmp_path / "x.gguf").symlink_to("nowhere")
    assert refusal(tmp_path / "x.gguf").startswith("x.gguf: named by the command, but is a link to ")
    (tmp_path / "y.gguf").mkdir()
    assert refusal(tmp_path / "y.gguf").startswith("config.json: named by the checkpoint, but is not there")


def test_links_that_lead_out_are_followed_on_request(tmp_path: Path) -> None:
    """As in the store of another program, whose files have other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "models").mkdir()
    put(tmp_path / "blobs", "sha256-0123")
    link = tmp_path / "models" / Q4
    link.symlink_to(tmp_path / "blobs" / "sha256-0123")
    assert refusal(link).endswith(
        "outside the folder; copy the file or open its folder, or --follow-links if the links are yours"
    )
    for source in (link, link.parent):
        assert list(open_source(source, links=True).refs) == ["a", "b"]


def test_the_folder_around_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "Q4_K_M").mkdir()
    put(tmp_path / "Q4_K_M")
    assert refusal(tmp_path).endswith(f"; Q4_K_M/ is one: open {tmp_path}/Q4_K_M")


# --- parts -----------------------------------------------------------------------------------------------------------


def test_any_part_and_the_folder_are_the_whole(tmp_path: Path) -> None:
    parts = put_parts(tmp_path)
    for source in (*parts, tmp_path):
        found = open_source(source)
        assert list(found.refs) == ["t0", "t1", "t2"]
        assert list(found.ranks[0].files) == parts
        assert found.config["general.architecture"] == "ernie4_5"
        assert found.config["tensors"] == 3
        assert (found.anomalies, found.notes) == ((), ())


def test_a_first_part_may_hold_keys_alone(tmp_path: Path) -> None:
    put(tmp_path, "X-00001-of-00002.gguf", *split(0, 2, 1), tensors=())
    put(tmp_path, "X-00002-of-00002.gguf", *split(1, 2, 1), tensors=("a",), arch=False)
    found = open_source(tmp_path)
    assert (list(found.refs), found.anomalies, len(found.ranks[0].files)) == (["a"], (), 2)


def test_a_missing_part_is_an_anomaly_and_a_missing_first_part_the_end(tmp_path: Path) -> None:
    parts = put_parts(tmp_path)
    parts[2].unlink()
    assert open_source(tmp_path).anomalies == (f"2 of 3 parts are there; not there: {PARTS[2]}",)
    put_parts(tmp_path)
    parts[0].unlink()
    said = f"{PARTS[1]}: is a part of a model; the first part, which says what the model is, is not there"
    for source in (tmp_path, parts[1], parts[2]):
        with pytest.raises(MissingFileError) as error:
            open_source(source)
        assert str(error.value) == said


def test_of_many_missing_parts_three_are_named(tmp_path: Path) -> None:
    put(tmp_path, "X-00001-of-99999.gguf", *split(0, 65535))
    few = ", ".join(f"X-{n:05d}-of-99999.gguf" for n in (2, 3, 4))
    assert open_source(tmp_path).anomalies == (
        f"1 of 99999 parts are there; not there: {few} and 99995 more",
        "X-00001-of-99999.gguf: split.no is 0 and split.count 65535; by its name they are 0 and 99999",
    )


@pytest.mark.parametrize(
    ("number", "keys", "said"),
    [
        (1, split(2), f"{PARTS[1]}: split.no is 2 and split.count 3; by its name they are 1 and 3"),
        (1, split(1, 4), f"{PARTS[1]}: split.no is 1 and split.count 4; by its name they are 1 and 3"),
        (2, [], f"{PARTS[2]}: split.no is None and split.count None; by its name they are 2 and 3"),
        (0, [key("split.no", STRING, "0"), *split(0)[1:]], f"{PARTS[0]}: split.no is '0' and split.count 3; by its name"),
        (0, split(0, 3, 4), f"{PARTS[0]}: split.tensors.count is 4, the parts hold 3"),
        (2, split(2, 3, -1), f"{PARTS[2]}: split.tensors.count is -1, the parts hold 3"),
    ],
)
def test_a_part_that_says_that_it_is_another_is_an_anomaly(tmp_path: Path, number: int, keys: list[bytes], said: str) -> None:
    put_parts(tmp_path)
    put(tmp_path, PARTS[number], *keys, tensors=(f"t{number}",), arch=number == 0)
    assert any(line.startswith(said) for line in open_source(tmp_path).anomalies)


def test_a_tensor_in_two_parts_is_an_anomaly(tmp_path: Path) -> None:
    put_parts(tmp_path)
    put(tmp_path, PARTS[2], *split(2), tensors=("t0",), arch=False)
    assert open_source(tmp_path).anomalies[0] == f"t0: stands in {PARTS[0]} and again in {PARTS[2]}"


def test_a_part_under_another_name_is_refused_and_what_was_merged_is_not(tmp_path: Path) -> None:
    put(tmp_path, "renamed.gguf", *split(0))
    assert refusal(tmp_path) == (
        "renamed.gguf: is a part of a split model (split.count is 3), whose name should end with -00001-of-00003.gguf or the like"
    )
    put(tmp_path, "renamed.gguf", *split(0, 0))
    assert open_source(tmp_path).anomalies == ()
    (tmp_path / "renamed.gguf").unlink()
    put(tmp_path, "X-00001-of-00001.gguf", *split(0, 1, 2))
    assert open_source(tmp_path).anomalies == ()


def test_names_of_parts() -> None:
    names = [
        "b.gguf",
        "X-00002-of-00002.gguf",
        "X-00001-of-00002.gguf",
        "X-00003-of-00002.gguf",
        "X-00000-of-00000.gguf",
        "x.bin",
    ]
    assert models(names) == [
        Model(("X-00000-of-00000.gguf",)),
        Model(("X-00001-of-00002.gguf", "X-00002-of-00002.gguf"), 2),
        Model(("X-00003-of-00002.gguf",)),
        Model(("b.gguf",)),
    ]
    assert models(["a-00001-of-00002.gguf", "b-00002-of-00002.gguf", "a-00001-of-00003.gguf"]) == [
        Model(("a-00001-of-00002.gguf",), 2),
        Model(("a-00001-of-00003.gguf",), 3),
        Model(("b-00002-of-00002.gguf",), 2),
    ]


# --- beside other weights --------------------------------------------------------------------------------------------

NEW = {"new": torch.ones(4)}


def safetensors(folder: Path) -> str:
    return write_safetensors(folder / "model.safetensors", NEW).name


def pickled(folder: Path) -> str:
    return write_bin(folder / "pytorch_model.bin", NEW).name


@pytest.mark.parametrize("write", [safetensors, pickled])
def test_other_weights_come_first_and_the_file_is_named(tmp_path: Path, write: Callable[[Path], str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    put(tmp_path)
    put(tmp_path, "mmproj.gguf")
    put_parts(tmp_path)
    title = write(tmp_path)
    found = open_source(tmp_path)
    assert list(found.refs) == ["new"]
    said = f"weights are read from {title}; also there, and not read: {PARTS[0]} and 2 more, {Q4}"
    assert found.others == (said,)
    assert found.notes[:2] == (said, f"not read and not carried along: {', '.join([*PARTS, Q4, 'mmproj.gguf'])}")
    named = open_source(tmp_path / Q4)
    assert list(named.refs) == ["a", "b"]
    assert named.others == (f"weights are read from {Q4}; also there, and not read: {title}",)


def test_an_index_without_its_files_and_pointers_stand_in_nobodys_way(tmp_path: Path) -> None:
    put(tmp_path)
    index = "model.safetensors.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    (tmp_path / "X-Q8_0.gguf").write_text(POINTER)
    found = open_source(tmp_path)
    assert list(found.refs) == ["a", "b"]
    others = f"{index} (1 file(s), of which none is there), pytorch_model.bin"
    assert found.others == (f"weights are read from {Q4}; also there, and not read: {others}",)


def test_pointers_alone_say_how_to_fetch_what_they_mean(tmp_path: Path) -> None:
    (tmp_path / Q4).write_text(POINTER)
    for source in (tmp_path, tmp_path / Q4):
        assert refusal(source).startswith(f"{Q4}: a Git LFS pointer, not the file itself; `git lfs install`")


def test_ranks_come_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    put(tmp_path)
    for rank in ("rank0", "rank1"):
        (tmp_path / rank).mkdir()
        safetensors(tmp_path / rank)
    assert len(open_source(tmp_path).ranks) == 2


def test_an_index_does_not_name_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    put(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": Q4}}))
    assert refusal(tmp_path) == f"model.safetensors.index.json: a is said to be in '{Q4}', which is no weight file"


def test_the_command_line_takes_a_file(command: Command, tmp_path: Path) -> None:
    code, _, err = command("inspect", put(tmp_path, Q4, key("general.type", STRING, "adapter")))
    assert (code, err) == (1, f"error: {Q4}: is no model; its general.type is 'adapter'\n")
