"""Which files are the model, where several could be: the right ones are read, and the others are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.bad_input import CONVERT
from helpers.models import GOLDEN
from helpers.synthetic import (
    exact,
    read_file,
    tiny,
    write_bin,
    write_index,
    write_model,
    write_pdparams,
    write_ranks,
    write_safetensors,
)

from ernie_quant.errors import CheckpointError
from ernie_quant.sources import open_source

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
Command = Callable[..., tuple[int, str, str]]

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4.0)
NEW, OLD = {"a": A, "b": B}, {"a": A + 1, "b": B + 1}
CONFIG = {"model_type": "ernie4_5"}
INDEX = "model.safetensors.index.json"


def shards(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 2) -> None:
    """As an earlier save left them, without an index."""
    for i, name in enumerate(shards(count)):
        write_safetensors(folder / name, dict(list(tensors.items())[i::count]))


def is_new(folder: Path) -> bool:
    """Are the tensors that would be read those of `NEW`?"""
    checkpoint = open_source(folder)
    assert checkpoint.anomalies == ()
    found = {ref.file: read_file(ref.file) for ref in checkpoint.refs.values()}
    return exact({name: found[ref.file][name] for name, ref in checkpoint.refs.items()}) == exact(NEW)


def read_from(title: str, others: str) -> str:
    return f"weights are read from {title}; also there, and not read: {others}"


def single(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", NEW)


def sharded(folder: Path) -> None:
    write_shards(folder, NEW)
    write_index(folder, {"a": shards(2)[0], "b": shards(2)[1]})


def old_single(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", OLD)


def old_bin(folder: Path) -> None:
    write_bin(folder / "pytorch_model.bin", OLD)


def old_bin_sharded(folder: Path) -> None:
    write_bin(folder / "pytorch_model-00001-of-00001.bin", OLD)
    table = {"weight_map": dict.fromkeys(OLD, "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(table))


def old_pdparams(folder: Path) -> None:
    write_pdparams(folder / "model_state.pdparams", OLD)


def old_shards(folder: Path) -> None:
    write_shards(folder, OLD, 1)


def stale_index(folder: Path) -> None:
    write_index(folder, {"a": shards(9)[0], "b": shards(9)[8]})


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def partial_shards(folder: Path) -> None:
    write_safetensors(folder / "model-00002-of-00003.safetensors", OLD)


def old_ranks(folder: Path) -> None:
    for rank in ("rank0", "rank1"):
        (folder / rank).mkdir()
        write_safetensors(folder / rank / "model.safetensors", OLD)


VLLM, FASTDEPLOY = " (transformers chooses so too, vLLM does not)", " (FastDeploy would read .pdparams first)"
SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("new", "old", "note"),
    [
        (single, old_bin, read_from("model.safetensors", "pytorch_model.bin")),
        (single, old_bin_sharded, read_from("model.safetensors", "pytorch_model.bin.index.json (1 file(s))")),
        (single, old_pdparams, read_from("model.safetensors", "model_state.pdparams") + FASTDEPLOY),
        (single, old_shards, read_from("model.safetensors", SHARD) + VLLM),
        (single, partial_shards, read_from("model.safetensors", "model-00002-of-00003.safetensors") + VLLM),
        (single, stale_index, read_from("model.safetensors", f"{INDEX} (2 file(s), of which none is there)") + VLLM),
        (single, broken_index, read_from("model.safetensors", INDEX) + VLLM),
        (single, old_ranks, "weights are read from the folder itself; also there, and not read: rank0, rank1"),
        (sharded, old_bin, read_from(INDEX, "pytorch_model.bin")),
        (sharded, old_shards, read_from(INDEX, SHARD)),
        (sharded, partial_shards, read_from(INDEX, "model-00002-of-00003.safetensors")),
        (sharded, old_ranks, "weights are read from the folder itself; also there, and not read: rank0, rank1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [1, -1])
def test_of_two_sets_the_right_one_is_read_and_the_other_named(
    tmp_path: Path, new: Callable[[Path], None], old: Callable[[Path], None], note: str, order: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for write in (old, new)[::order]:
        write(tmp_path)
    assert is_new(tmp_path)
    assert note in open_source(tmp_path).notes


def test_one_file_comes_before_shards_that_an_index_names(tmp_path: Path) -> None:
    """transformers takes it; vLLM would not, and the note says so."""
    write_model(tmp_path / "m", CONFIG, OLD, shards=2)
    single(tmp_path / "m")
    assert is_new(tmp_path / "m")
    assert open_source(tmp_path / "m").notes[0] == read_from("model.safetensors", f"{INDEX} (2 file(s))") + VLLM


def test_an_index_of_one_file_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    single(tmp_path)
    write_index(tmp_path, {"a": "model.safetensors", "ghost": "model.safetensors"})
    assert open_source(tmp_path).anomalies == ("ghost: the index says it is in model.safetensors, which does not hold it",)


@pytest.mark.parametrize("rest", [write_shards, old_bin])
def test_an_index_whose_files_are_not_there_stands_in_nobodys_way(tmp_path: Path, rest: Callable[..., None]) -> None:
    """Of an earlier save, or of a download of everything but the safetensors."""
    (tmp_path / "config.json").write_text("{}")
    rest(*((tmp_path, NEW) if rest is write_shards else (tmp_path,)))
    stale_index(tmp_path)
    first = shards(2)[0] if rest is write_shards else "pytorch_model.bin"
    assert sorted(open_source(tmp_path).refs) == ["a", "b"]
    assert open_source(tmp_path).notes[0] == read_from(f"{first}", f"{INDEX} (2 file(s), of which none is there)")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    return str(error.value)


def test_an_index_without_any_of_its_files_says_which_to_download(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    stale_index(tmp_path)
    assert (
        refusal(tmp_path) == f"{INDEX}: names 2 file(s), of which none is there ({shards(9)[0]}, {shards(9)[8]}); download them"
    )
    write_index(tmp_path, {f"t{i}": name for i, name in enumerate(shards(9))})
    assert refusal(tmp_path).endswith(f"names 9 file(s), of which none is there ({', '.join(shards(9)[:3])}, …); download them")


def test_some_files_of_an_index_are_missing_and_another_set_is_whole(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIG, NEW, shards=2)
    (folder / shards(2)[1]).unlink()
    old_bin(folder)
    assert open_source(folder).anomalies == (
        f"{INDEX}: is read before pytorch_model.bin; move it away to have the other read",
        f"{shards(2)[1]}: named by {INDEX}, but is not there",
    )


def test_shards_of_two_saves_without_an_index_are_refused_unless_one_is_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shards(tmp_path, NEW)
    write_shards(tmp_path, OLD, 3)
    assert refusal(tmp_path) == (
        f"{shards(2)[0]} and {shards(3)[0]} are the first of two complete sets of weights, and no index says which are the"
        " model's; move the others away"
    )
    (tmp_path / shards(3)[0]).unlink()
    assert is_new(tmp_path)
    assert open_source(tmp_path).notes[0] == read_from(f"{shards(2)[0]}", f"{shards(3)[1]} and 1 more")


def test_ranks_are_read_beside_an_index_that_is_left_over(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "tp", "moe", 2)
    stale_index(folder)
    checkpoint = open_source(folder)
    assert len(checkpoint.ranks) == 2
    assert checkpoint.notes[0].startswith(f"weights are read from the ranks; {INDEX}: names 2 file(s), of which none is there")


def test_the_note_is_in_inspect_plan_dry_run_and_card(command: Command, tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "moe/pt", tmp_path / "src"))
    tensors = read_file(source / "model.safetensors")
    write_bin(source / "pytorch_model.bin", {name: t + 1 for name, t in tensors.items()})
    note = read_from("model.safetensors", "pytorch_model.bin")
    for words in (("inspect", source), ("plan", source), ("convert", source, tmp_path / "x", "--to", "pt", "--dry-run")):
        code, out, _ = command(*words)
        assert (code, f"note: {note}" in out.splitlines()) == (0, True)
    assert note in json.loads(command("plan", source, "--json")[1])["notes"]
    assert command("convert", source, tmp_path / "out", "--to", "pt")[0] == 0
    assert f"- {note}\n" in (tmp_path / "out/README.md").read_text()
    assert exact(read_file(tmp_path / "out/model.safetensors")) == exact(tensors)


def test_tensors_that_are_missing_are_missing_in_the_set_that_is_read(command: Command, tmp_path: Path) -> None:
    """Whoever reads the refusal must know that the other set is there."""
    config, tensors = tiny()
    source = write_model(tmp_path / "src", config, tensors)
    write_bin(source / "pytorch_model.bin", tensors)
    del tensors["model.norm.weight"]
    write_safetensors(source / "model.safetensors", tensors)
    assert command("convert", source, tmp_path / "out", *CONVERT[3:])[2].splitlines()[1:] == [
        "  model.norm.weight: is missing",
        f"  {read_from('model.safetensors', 'pytorch_model.bin')}",
    ]


# --- links and leftovers beside the weights ----------------------------------------------------------------------------


def test_links_that_lead_nowhere_and_pipes_beside_the_weights_are_left(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIG, NEW)
    (folder / "tokenizer.model").symlink_to("/nowhere/tokenizer.model")
    (folder / "vocab.txt").symlink_to("gone.txt")
    os.mkfifo(folder / "pipe")
    checkpoint = open_source(folder)
    assert checkpoint.extra_files == {}
    nowhere = "a link that leads nowhere"
    assert checkpoint.notes == (
        f"not read and not carried along: pipe (not a regular file), tokenizer.model ({nowhere}), vocab.txt ({nowhere})",
    )


def test_a_weight_file_that_is_a_link_to_nothing_is_missing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIG, NEW, shards=2)
    (folder / shards(2)[0]).unlink()
    (folder / shards(2)[0]).symlink_to("/nowhere/shard")
    said = f"{shards(2)[0]}: named by {INDEX}, but is a link to /nowhere/shard, which is not there"
    assert open_source(folder).anomalies == (said,)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").write_text("{}")
    (tmp_path / "one/model.safetensors").symlink_to("/nowhere/model")
    assert refusal(tmp_path / "one") == "model.safetensors: is a link that leads nowhere"


def test_links_of_ones_own_are_followed_on_request(command: Command, tmp_path: Path) -> None:
    real = Path(shutil.copytree(GOLDEN / "moe/pt", tmp_path / "real"))
    (tmp_path / "src").mkdir()
    for file in real.iterdir():
        (tmp_path / "src" / file.name).symlink_to(file)
    words = ("convert", tmp_path / "src", tmp_path / "out", "--to", "pt", "--quiet")
    code, _, err = command(*words)
    assert (code, err.count("\n")) == (1, 1)
    assert err.endswith("outside the folder; copy the file or open its folder, or --follow-links if the links are yours\n")
    for more in (("inspect", tmp_path / "src"), ("plan", tmp_path / "src"), words):
        assert command(*more)[0] == 1
        assert command(*more, "--follow-links")[0] == 0
    assert exact(read_file(tmp_path / "out/model.safetensors")) == exact(read_file(real / "model.safetensors"))
    assert command("verify", tmp_path / "out", "--against", tmp_path / "src")[0] == 1
    assert command("verify", tmp_path / "out", "--against", tmp_path / "src", "--follow-links")[0] == 0


def test_ranks_in_a_download_cache_are_read(tmp_path: Path) -> None:
    """Their files are links to `blobs`, one folder deeper than others."""
    cache = tmp_path / "models--baidu--ERNIE-TP2"
    snapshot = write_ranks(cache / "snapshots/abc", "moe", 2)
    (cache / "blobs").mkdir()
    for file in [p for p in snapshot.rglob("*") if p.is_file()]:
        blob = cache / "blobs" / f"{file.parent.name}-{file.name}"
        file.rename(blob)
        file.symlink_to(blob)
    assert len(open_source(snapshot).ranks) == 2
