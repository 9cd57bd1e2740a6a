from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.synthetic import exact, golden, write_bin, write_index, write_model, write_pdparams, write_ranks, write_safetensors

from ernie_quant.errors import CheckpointError, shown
from ernie_quant.paths import inside
from ernie_quant.planning.make import make_plan
from ernie_quant.sources import open_source
from ernie_quant.views import read
from ernie_quant.views.files import Files

CONFIG = {"model_type": "ernie4_5"}
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4.0).to(torch.bfloat16)
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """`a` in the first file, `b` in the second, and an index."""
    return write_model(tmp_path / "model", CONFIG, {"a": A, "b": B}, shards=2)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line


def test_a_sharded_folder_is_one_checkpoint(sharded: Path) -> None:
    checkpoint = open_source(sharded)
    assert {name: ref.file.name for name, ref in checkpoint.refs.items()} == {"a": FILES[0], "b": FILES[1]}
    assert checkpoint.nbytes == 6 * 4 + 4 * 2
    assert checkpoint.config == CONFIG
    assert (checkpoint.anomalies, checkpoint.notes, checkpoint.extra_files) == ((), (), {})


@pytest.mark.parametrize("write", [write_pdparams, write_bin, write_safetensors])
def test_a_folder_of_each_format(tmp_path: Path, write: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    name = {write_pdparams: "model_state.pdparams", write_bin: "pytorch_model.bin", write_safetensors: "model.safetensors"}[write]
    write(tmp_path / name, {"a": A, "b": B})  # type: ignore[operator]
    assert list(open_source(tmp_path).refs) == ["a", "b"]


# --- what the index says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "sub/../../model.safetensors", "/etc/model.safetensors",
        "C:\\model.safetensors", "C:model.safetensors",
        "..\\model.safetensors", "sub\\model.safetensors", "\\\\host\\share\\m.safetensors",
        "//host/m.safetensors", "a:b.safetensors", "m\0.safetensors", "m\n.safetensors",
    ],
)  # fmt: skip
def test_an_index_that_names_a_file_outside_is_refused(sharded: Path, name: str) -> None:
    write_safetensors(sharded.parent / "model.safetensors", {"a": A})
    write_index(sharded, {"a": name, "b": FILES[1]})
    line = refusal(sharded)
    assert line == f"model.safetensors.index.json names the file {name!r}, which is not a plain name in the folder"


def test_an_index_with_half_a_character_is_no_json(sharded: Path) -> None:
    write_index(sharded, {"a": "\ud800.safetensors"})
    assert refusal(sharded).startswith("model.safetensors.index.json: is not valid JSON: 'utf-8' codec can't encode")


@pytest.mark.parametrize("name", ["", "..", "config.json", "model.safetensors/..", "weights.gguf"])
def test_an_index_that_names_no_weight_file_is_refused(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name})
    assert refusal(sharded) == f"model.safetensors.index.json: a is said to be in {name!r}, which is no weight file"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "model.safetensors.index.json: is not a JSON object"),
        ("{", "model.safetensors.index.json: is not valid JSON"),
        ("{}", "model.safetensors.index.json: has no weight_map of names to file names"),
        ('{"weight_map": []}', "has no weight_map of names to file names"),
        ('{"weight_map": {"a": 1}}', "has no weight_map of names to file names"),
        ('{"weight_map": {"a\\n": "m.safetensors"}}', r"names a tensor 'a\n', which is not printable"),
        ('{"weight_map": ' + "[" * 100_000, "is nested too deep"),
        ('{"weight_map": {}}', "holds no weights"),
        (json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}}), "File name too long"),
    ],
)
def test_an_index_that_is_none_is_refused(sharded: Path, text: str, reason: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert reason in refusal(sharded)


def test_a_missing_shard_is_one_anomaly_however_many_tensors_it_had(sharded: Path) -> None:
    (sharded / FILES[1]).unlink()
    write_index(sharded, {"a": FILES[0], "b": FILES[1], "c": FILES[1]})
    checkpoint = open_source(sharded)
    assert checkpoint.anomalies == (f"{FILES[1]}: named by model.safetensors.index.json, but is not there",)
    assert list(checkpoint.refs) == ["a"]


def test_the_index_and_the_files_must_name_the_same_tensors(sharded: Path) -> None:
    write_index(sharded, {"a": FILES[1], "c": FILES[1]})
    write_safetensors(sharded / FILES[0], {"a": A})
    # FILES[0] is named by nothing, so it is not read
    assert set(open_source(sharded).anomalies) == {
        f"a: the index says it is in {FILES[1]}, which does not hold it",
        f"c: the index says it is in {FILES[1]}, which does not hold it",
    }


def test_a_tensor_in_another_file_than_the_index_says_is_no_anomaly_but_a_note(sharded: Path) -> None:
    """Every tensor is there, and programs read all of every file; `verify` asks for the slips."""
    write_index(sharded, {"a": FILES[1], "b": FILES[0]})
    checkpoint = open_source(sharded)
    slip = f"a: the index says it is in {FILES[1]}, it is in {FILES[0]}"
    assert checkpoint.anomalies == ()
    assert checkpoint.slips == (slip, f"b: the index says it is in {FILES[0]}, it is in {FILES[1]}")
    assert checkpoint.notes == (f"model.safetensors.index.json: {slip}, and 1 more like it; the files are what is read",)


def test_a_name_that_the_index_forgot_is_a_note(sharded: Path) -> None:
    write_safetensors(sharded / FILES[1], {"b": B, "c": A})
    checkpoint = open_source(sharded)
    slip = f"c: is in {FILES[1]}, the index does not name it"
    assert (checkpoint.anomalies, checkpoint.slips, list(checkpoint.refs)) == ((), (slip,), ["a", "b", "c"])
    assert checkpoint.notes == (f"model.safetensors.index.json: {slip}; the files are what is read",)


def test_a_tensor_in_two_files_is_an_anomaly(sharded: Path) -> None:
    write_safetensors(sharded / FILES[1], {"a": A, "b": B})
    assert f"a: stands in {FILES[0]} and again in {FILES[1]}" in open_source(sharded).anomalies


# --- shards without an index -----------------------------------------------------------------------------------------


def test_shards_without_an_index_are_read_if_they_are_complete(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert open_source(sharded).anomalies == ()
    assert list(open_source(sharded).refs) == ["a", "b"]
    (sharded / FILES[0]).unlink()
    assert open_source(sharded).anomalies == ("1 shards are there, their names promise 2",)


def test_a_truncated_shard_is_refused(sharded: Path) -> None:
    os.truncate(sharded / FILES[1], (sharded / FILES[1]).stat().st_size - 1)
    assert refusal(sharded).startswith(f"{FILES[1]}: truncated: the header promises")


# --- rank folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "ranks"), [("dense", 2), ("moe", 2), ("moe", 1)])
def test_rank_folders_are_merged_to_the_golden_pt_checkpoint(tmp_path: Path, model: str, ranks: int) -> None:
    checkpoint = open_source(write_ranks(tmp_path / "tp", model, ranks))
    assert len(checkpoint.ranks) == ranks
    plan = make_plan(checkpoint, runtime="vllm")
    with Files() as files:
        merged = {step.name: read.read(step.view, files) for step in plan.steps}
    expected = {n: t for n, t in golden(model, "pt")[1].items() if n in merged}
    assert exact(merged) == exact(expected)
    assert set(golden(model, "pt")[1]) - set(merged) <= {"lm_head.weight"}  # tied: stored or not


def test_rank_pickles_in_one_folder_are_ranks_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for rank in (0, 1):
        write_pdparams(tmp_path / f"model_state.tp0{rank}.pdparams", {"a": A + rank})
    files = [[f.name for f in rank.files] for rank in open_source(tmp_path).ranks]
    assert files == [["model_state.tp00.pdparams"], ["model_state.tp01.pdparams"]]


def test_a_missing_rank_is_refused(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "tp", "dense", 2)
    (folder / "rank0").rename(folder / "rank2")
    assert refusal(folder) == f"{folder}: has the ranks [1, 2], not 0 to 1"


def test_a_rank_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "tp", "dense", 2)
    (folder / "rank1").rename(tmp_path / "elsewhere")
    (folder / "rank1").symlink_to(tmp_path / "elsewhere")
    assert refusal(folder) == "rank1: is a link; open the folder that it points to, or --follow-links"
    assert len(open_source(folder, links=True).ranks) == 2


# --- links and things that are no files ------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused(sharded: Path) -> None:
    (sharded / FILES[0]).rename(sharded.parent / "stray.safetensors")
    (sharded / FILES[0]).symlink_to(sharded.parent / "stray.safetensors")
    assert refusal(sharded).startswith(f"{FILES[0]}: is a link to {sharded.parent / 'stray.safetensors'}, outside the folder")


def test_a_link_within_the_folder_is_followed(sharded: Path) -> None:
    (sharded / FILES[0]).rename(sharded / "kept.safetensors")
    (sharded / FILES[0]).symlink_to("kept.safetensors")
    assert list(open_source(sharded).refs) == ["a", "b"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", *FILES])
def test_links_in_a_circle_are_refused(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    assert refusal(sharded).startswith(f"{name}: named by ")


def test_a_link_to_the_blobs_of_a_download_cache_is_followed_and_no_other(tmp_path: Path) -> None:
    cache = tmp_path / "models--baidu--ERNIE"
    snapshot = write_model(cache / "snapshots" / "abc", CONFIG, {"a": A})
    (cache / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(cache / "blobs" / f"sha-{file.name}")
        file.symlink_to(f"../../blobs/sha-{file.name}")
    assert list(open_source(snapshot).refs) == ["a"]
    (tmp_path / "short").symlink_to(snapshot)  # the folder itself may be a link
    assert list(open_source(tmp_path / "short").refs) == ["a"]

    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/../secret.safetensors")
    write_safetensors(cache / "secret.safetensors", {"a": A})
    assert "outside the folder" in refusal(snapshot)


@pytest.mark.parametrize("name", ["config.json", *FILES])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused_at_once(sharded: Path, name: str, kind: str) -> None:
    (sharded / name).unlink()
    if kind == "folder":
        (sharded / name).mkdir()
    else:
        os.mkfifo(sharded / name)  # to open it would wait for ever
    assert refusal(sharded).startswith(f"{name}: named by ")
    assert refusal(sharded).endswith("is no regular file")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model") == f"{tmp_path / 'model'}: there is no such folder"
    (tmp_path / "model").write_text("")
    assert refusal(tmp_path / "model") == f"{tmp_path / 'model'}: is not a folder"
    assert refusal(tmp_path) == "config.json: named by the checkpoint, but is not there"
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights" in refusal(tmp_path)


def test_inside_gives_the_path_of_a_plain_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.bin").write_bytes(b"")
    assert inside(tmp_path, "sub/m.bin", "a test") == tmp_path / "sub" / "m.bin"


# --- other files -----------------------------------------------------------------------------------------------------


def test_what_lies_beside_the_weights_is_listed_and_other_weights_are_named(sharded: Path) -> None:
    beside = ["LICENSE", "README.md", "adapter_config.json", "chat_template.jinja", "modeling.py", "tokenizer.model"]
    weights = ["model.gguf", "optimizer.pt", "pytorch_model.bin", "scheduler.pdparams"]
    for name in [*beside, *weights, ".gitattributes", "report.json"]:
        (sharded / name).write_text("x")
    (sharded / "onnx").mkdir()
    checkpoint = open_source(sharded)
    assert [p.name for p in checkpoint.extra_files] == sorted([*beside, *weights])
    assert checkpoint.extra_folders == ("onnx",)
    others = "weights are read from model.safetensors.index.json; also there, and not read: pytorch_model.bin, model.gguf"
    left = "model.gguf, optimizer.pt, pytorch_model.bin, scheduler.pdparams"
    assert checkpoint.notes == (others, f"not read and not carried along: {left}")
    assert list(checkpoint.refs) == ["a", "b"]


def test_a_download_that_may_not_have_ended_is_noted(sharded: Path) -> None:
    (sharded / f"{FILES[0]}.aria2").write_text("x")
    assert open_source(sharded).notes == (f"{FILES[0]}.aria2 lies beside {FILES[0]}: its download may not have ended",)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_pdparams(tmp_path / "model_state.pdparams", {"old": A})
    write_safetensors(tmp_path / "model.safetensors", {"new": A})
    assert list(open_source(tmp_path).refs) == ["new"]
    others = "weights are read from model.safetensors; also there, and not read: model_state.pdparams"
    left = "not read and not carried along: model_state.pdparams"
    assert open_source(tmp_path).notes == (f"{others} (FastDeploy would read .pdparams first)", left)


def test_another_file_that_is_a_link_out_of_the_folder_is_refused(sharded: Path) -> None:
    (sharded / "tokenizer.model").symlink_to("/etc/passwd")
    assert "tokenizer.model: is a link to /etc/passwd, outside the folder" in refusal(sharded)


def test_links_to_one_file_do_not_multiply_the_work(sharded: Path) -> None:
    (sharded / FILES[1]).unlink()
    (sharded / FILES[1]).symlink_to(FILES[0])
    assert refusal(sharded) == f"{FILES[1]}: is the same file as {FILES[0]}"


def test_more_tensors_than_any_model_has_are_refused(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie_quant.sources.sets.MAX_TENSORS", 1)
    assert "names 2 tensors, more than any such model has" in refusal(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    assert "holds more than 1 tensors, which no such model has" in refusal(sharded)


def test_a_thousand_anomalies_are_fifty_and_a_number(sharded: Path) -> None:
    index = {"weight_map": {f"t{i}": FILES[0] for i in range(1001)}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_source(sharded)
    assert len(checkpoint.anomalies) > 1000
    assert shown(checkpoint.anomalies)[50:] == [f"… and {len(checkpoint.anomalies) - 50} more"]
