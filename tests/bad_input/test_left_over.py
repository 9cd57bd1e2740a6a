"""What was left where a model should be: pointers of git, an entry of config.json, the wrong folder, names that are no text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bad_input import CONVERT, EXPERT, SHARDS, WINT4, Run, refused
from helpers.synthetic import exact, read_file, tiny, write_bin, write_model, write_ranks

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "7" * 64 + "\nsize 4976698672\n"
FETCH = "`git lfs install` and `git lfs pull` in its folder fetch what is meant"
ONE = f"a Git LFS pointer, not the file itself; {FETCH}"
COMMANDS = [("inspect", "SRC"), ("plan", "SRC"), CONVERT, WINT4]

# --- a clone without git-lfs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model_state.pdparams", "pytorch_model.bin", "model_state.tp00.pdparams"])
def test_weights_that_are_pointers(run: Run, source: Callable[..., Path], name: str, command: tuple[str, ...]) -> None:
    folder = source()
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    refused(run(*command), f"{name}: {ONE}")


def test_all_shards_are_pointers(run: Run, source: Callable[..., Path]) -> None:
    folder = source(shards=5)
    for file in folder.glob("*.safetensors"):
        file.write_text(POINTER)
    first = ", ".join(f"model-0000{i}-of-00005.safetensors" for i in (1, 2, 3))
    line = f"{first} and 2 more: Git LFS pointers, not the files themselves; {FETCH}"
    refused(run("inspect", "SRC"), line)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    refused(run("inspect", "SRC"), f"model.safetensors.index.json, {first.rpartition(',')[0]} and 3 more: Git LFS pointers")


def test_one_shard_of_two_is_a_pointer(run: Run, source: Callable[..., Path]) -> None:
    (source(shards=2) / SHARDS[1]).write_text(POINTER)
    refused(run(*CONVERT), f"{SHARDS[1]}: {ONE}")


def test_config_json_is_a_pointer(run: Run, source: Callable[..., Path]) -> None:
    (source() / "config.json").write_text(POINTER)
    refused(run(*CONVERT), f"config.json: {ONE}")


def test_the_weights_of_a_rank_are_a_pointer(run: Run, tmp_path: Path) -> None:
    (write_ranks(tmp_path / "src", "moe", 2) / "rank1/model.safetensors").write_text(POINTER)
    refused(run(*CONVERT), f"model.safetensors: {ONE}")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "added_tokens.json"])
def test_a_tokenizer_that_is_a_pointer_is_not_carried_along_as_one(run: Run, source: Callable[..., Path], name: str) -> None:
    (source() / name).write_text(POINTER)
    outcome = run("inspect", "SRC")
    assert (outcome.code, outcome.stdout.splitlines()[-1]) == (1, f"anomaly: {name}: {ONE}")
    for command in (CONVERT, WINT4):
        refused(run(*command), f"{name}: {ONE}")


def test_pointers_that_nobody_needs_are_passed_over(run: Run, source: Callable[..., Path]) -> None:
    """`git lfs pull --include "*.safetensors"` leaves the others as they are."""
    folder = source()
    for name in ("pytorch_model.bin", "model.gguf", "model_state.pdparams", "logo.png"):
        (folder / name).write_text(POINTER)
    outcome = run(*WINT4)
    assert outcome.code == 0
    assert "note: not read and not carried along: model.gguf, model_state.pdparams, pytorch_model.bin" in outcome.stdout
    assert not (outcome.out / "logo.png").exists()


@pytest.mark.parametrize("index", [False, True])
def test_weights_that_were_fetched_are_read_beside_pointers_of_others(run: Run, source: Callable[..., Path], index: bool) -> None:
    """`git lfs pull --include "*.bin"`: what transformers would choose is not there."""
    folder = source(shards=2 if index else 1)
    for file in folder.glob("*.safetensors"):
        file.write_text(POINTER)
    write_bin(folder / "pytorch_model.bin", tiny()[1])
    outcome = run(*CONVERT)
    assert outcome.code == 0
    title = "model.safetensors.index.json (2 file(s), which are Git LFS pointers)" if index else "model.safetensors"
    assert f"note: weights are read from pytorch_model.bin; also there, and not read: {title}" in outcome.stdout
    assert exact(read_file(outcome.out / "model.safetensors")) == exact(tiny()[1])


def test_a_small_file_that_only_speaks_of_pointers_is_none(run: Run, source: Callable[..., Path]) -> None:
    folder = source()
    (folder / "NOTES.md").write_text("see " + POINTER)
    (folder / "long.md").write_text(POINTER + "x" * 1000)
    assert run(*CONVERT).code == 0
    assert (folder.parent / "out/NOTES.md").is_file()
    assert (folder.parent / "out/long.md").is_file()


# --- a quantization_config over plain tensors ----------------------------------------------------------------------------

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("quantization_config", NF4, "quantization_config ('bitsandbytes')"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantization_config ('fp8')"),
        ("quantization_config", {"quantization": "wint2", "is_permuted": True}, "quantization_config"),
        ("compression_config", {"format": "pack-quantized"}, "compression_config"),
        ("quantization_config", {}, "quantization_config"),  # transformers would ask it for a method
        ("is_quantized", True, "is_quantized"),
    ],
)
def test_an_entry_left_over_in_config_json_is_dropped_and_named(
    run: Run, source: Callable[..., Path], key: str, value: Any, said: str
) -> None:
    source(**{key: value})
    note = (
        f"note: config.json: {said} is left over, as every tensor is plain (BF16, F32): they are taken as they are, it is dropped"
    )
    for command in COMMANDS:
        outcome = run(*command, *(["--restart"] if "OUT" in command else []))
        assert (outcome.code, note in outcome.stdout.splitlines()) == (0, True), command
    made = json.loads((outcome.out / "config.json").read_text())
    assert made["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "compression_config" not in made
    assert "is_quantized" not in made
    assert run("verify", "OUT", "--against", "SRC", "--full").code == 0
    assert run(*CONVERT, "--restart").code == 0
    assert (
        not {"quantization_config", "compression_config", "is_quantized"}
        & json.loads((outcome.out / "config.json").read_text()).keys()
    )
    assert run("verify", "OUT", "--against", "SRC", "--full").code == 0


@pytest.mark.parametrize("command", [("dequantize", "SRC", "OUT", "--to", "pt"), ("reshard", "SRC", "OUT", "--tp", "2")])
def test_what_is_plain_is_neither_dequantized_nor_resharded(
    run: Run, source: Callable[..., Path], command: tuple[str, ...]
) -> None:
    folder = source(quantization_config=NF4)
    why = "is not quantized (config.json has quantization_config, but every tensor is plain); convert it"
    refused(run(*command), f"{folder}: {why}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_one_tensor_that_is_not_plain_is_enough(run: Run, source: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = source({EXPERT: torch.zeros(32, 64).to(dtype)}, quantization_config=NF4)
    line = "is quantized already (config.json has quantization_config); start from the original checkpoint"
    refused(run(*CONVERT), f"{folder}: {line}")


# --- the wrong folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("baidu/ERNIE-4.5-21B-A3B-PT", "hf://baidu/ERNIE-4.5-21B-A3B-PT"),
        ("baidu/ERNIE-4.5-21B-A3B-PT@main", "hf://baidu/ERNIE-4.5-21B-A3B-PT@main"),
        ("huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT", "hf://baidu/ERNIE-4.5-21B-A3B-PT"),
        ("modelscope.cn/models/PaddlePaddle/ERNIE-4.5-0.3B-PT", "modelscope://PaddlePaddle/ERNIE-4.5-0.3B-PT"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_name_of_a_repository_in_place_of_a_folder(run: Run, typed: str, meant: str, command: tuple[str, ...]) -> None:
    refused(
        run(*(typed if word == "SRC" else word for word in command)), f"{typed}: there is no such folder; on a hub it is {meant}"
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT", "hf://baidu/ERNIE-4.5-21B-A3B-PT"),
        ("https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT/tree/main", "hf://baidu/ERNIE-4.5-21B-A3B-PT@main"),
        ("https://www.modelscope.cn/models/PaddlePaddle/ERNIE-4.5-0.3B-PT/", "modelscope://PaddlePaddle/ERNIE-4.5-0.3B-PT"),
    ],
)
def test_the_address_of_a_page_in_place_of_a_repository(run: Run, typed: str, meant: str) -> None:
    refused(run("inspect", typed), f"{typed}: is not SCHEME://ORG/NAME or SCHEME://ORG/NAME@REVISION; it is {meant}")


@pytest.mark.parametrize("typed", ["model", "a/b/c", "../baidu/x", "/baidu/x", "./x"])
def test_nothing_is_suggested_for_what_is_no_name_of_a_repository(run: Run, typed: str) -> None:
    outcome = run("inspect", typed)
    assert (outcome.code, outcome.stderr.endswith(": there is no such folder\n")) == (1, True)


@pytest.mark.parametrize("main", [None, "abc", "gone"])
def test_the_cache_of_a_download_names_its_snapshot(run: Run, source: Callable[..., Path], main: str | None) -> None:
    model = source()
    cache = model.parent / "models--baidu--ERNIE"
    for name, time in (("abc", 1000), ("def", 2000)):
        shutil.copytree(model, cache / "snapshots" / name)
        os.utime(cache / "snapshots" / name, (time, time))
    if main:
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text(main)
    wanted = cache / "snapshots" / ("abc" if main == "abc" else "def")
    line = f"config.json: named by the checkpoint, but is not there; it is the cache of a download: open {wanted}"
    refused(run("inspect", cache), line)
    assert run("inspect", wanted).code == 0


def test_the_folder_around_a_model_a_file_of_it_and_an_adapter(run: Run, source: Callable[..., Path]) -> None:
    folder = source()
    missing = "config.json: named by the checkpoint, but is not there"
    refused(run("inspect", folder.parent), f"{missing}; src/ is one: open {folder}")
    refused(run("inspect", folder / "model.safetensors"), f"model.safetensors: is not a folder; open {folder}")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    other = "consolidated.safetensors has another name or format than those that are read"
    none = "holds no weights (model*.safetensors, pytorch_model*.bin, model_state.pdparams or *.gguf)"
    refused(run("inspect", "SRC"), f"{folder}: {none}; {other}")
    (folder / "consolidated.safetensors").rename(folder / "adapter_model.safetensors")
    refused(run("inspect", "SRC"), f"{folder}: {none}; adapter_model.safetensors is an adapter: merge it into its model first")


# --- names that are no text ----------------------------------------------------------------------------------------------


def test_folders_whose_names_are_not_utf8(run: Run, tmp_path: Path) -> None:
    """As zip archives from Chinese Windows leave them; the result says the bytes as escapes."""
    src, out = (tmp_path / os.fsdecode(prefix + b"-\xc4\xa3\xd0\xcd") for prefix in (b"src", b"out"))
    write_model(src, *tiny())
    assert run("wint4", src, out, "--experts-only", "--group-size", "32").code == 0
    shown = r"src-ģ\udcd0\udccd" if os.fsdecode(b"\xc4\xa3") == "ģ" else ascii(src.name)[1:-1]
    assert json.loads((out / "ernie-quant.json").read_text())["source_name"] == shown
    assert shown in (out / "README.md").read_text()
    for words in (
        ("verify", out, "--against", src),
        ("inspect", src),
        ("inspect", out),
        ("report", out),
        ("inspect", out, "--json"),
    ):
        assert run(*words).code == 0, words
    assert run("inspect", src, "--json").code == 0
    again = run("wint4", src, out, "--experts-only", "--group-size", "32")
    assert (again.code, again.stdout.count("complete")) == (0, 1)
