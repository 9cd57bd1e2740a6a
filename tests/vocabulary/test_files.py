"""The files that a tokenizer is made of: where a chat template is found, and what is there instead of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.llama_cpp import needs_llama_cpp
from helpers.vocabularies import ARCHITECTURE, Reader, gguf, write

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary import FILES, read

ROWS = 2100
KEY = "tokenizer.ggml."
CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

Another = Callable[..., Path]


def test_where_a_chat_template_is_found(another: Another) -> None:
    folder = another()
    key = "tokenizer.chat_template"
    assert key not in read(folder, ROWS, CONFIG).keys
    write(folder, chat_template={"chat_template": "json"})
    assert read(folder, ROWS, CONFIG).keys[key] == "json"
    (folder / "chat_template.jinja").write_text("模板")
    assert read(folder, ROWS, CONFIG).keys[key] == "模板"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    found = read(write(folder, tokenizer_config={"chat_template": named}), ROWS, CONFIG)
    assert found.keys[key] == "d"
    assert found.notes[1:] == (
        "tokenizer_config.json: the chat templates tools are left out",
        "chat_template.jinja: another chat template than in tokenizer_config.json; left out",
        "chat_template.json: another chat template than in tokenizer_config.json; left out",
    )
    found = read(write(folder, tokenizer_config={"chat_template": "模板"}, chat_template={"chat_template": "模板"}), ROWS, CONFIG)
    assert (found.keys[key], found.notes[1:]) == ("模板", ())


@pytest.mark.parametrize("value", [1, ["x"], [{"name": "default"}], {"default": "x"}, "a\0b", "x" * (1 << 20) + "y"])
def test_what_is_no_chat_template(value: Any, another: Another) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json: (the )?chat.template (is|holds)"):
        read(write(another(), tokenizer_config={"chat_template": value}), ROWS, CONFIG)


def test_a_chat_template_in_another_encoding(another: Another) -> None:
    folder = another()
    (folder / "chat_template.jinja").write_bytes("模板".encode("gb18030"))
    with pytest.raises(CheckpointError, match=r"^chat_template\.jinja: is not UTF-8$"):
        read(folder, ROWS, CONFIG)


# --- no tokenizer, and files that are none -------------------------------------------------------------------------------


@needs_llama_cpp
def test_without_a_tokenizer(tmp_path: Path) -> None:
    """llama.cpp needs the rows then, under the architecture's name."""
    found = read(write(tmp_path, tokenizer_config={}), ROWS, CONFIG)
    assert found.keys == {f"{KEY}model": "no_vocab"}
    assert found.notes[0].startswith("no tokenizer (tokenizer.model, tokenizer.json): ")
    with Reader(gguf(tmp_path / "a.gguf", {**found.keys, f"{ARCHITECTURE}.vocab_size": ROWS})) as llama:
        assert llama.size == ROWS
    with Reader(gguf(tmp_path / "b.gguf", found.keys)) as llama:
        assert llama.size == 0


@needs_llama_cpp
def test_the_rows_do_no_harm_beside_a_tokenizer(ernie: Path, tmp_path: Path) -> None:
    keys = {**read(ernie, ROWS, CONFIG).keys, f"{ARCHITECTURE}.vocab_size": ROWS}
    with Reader(gguf(tmp_path / "a.gguf", keys)) as llama:
        assert llama.size == ROWS


@pytest.mark.parametrize("rows", [0, -1, 1 << 22])
def test_an_embedding_of_no_size(rows: int, ernie: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^an embedding of {rows} rows"):
        read(ernie, rows, CONFIG)


def test_a_link_out_of_the_folder_is_followed_only_if_told_so(ernie: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "tokenizer.model").symlink_to(ernie / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"^tokenizer\.model: is a link to .*, outside the folder"):
        read(folder, ROWS, CONFIG)
    assert read(folder, ROWS, CONFIG, links=True) == read(ernie, ROWS, CONFIG)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="which is not there"):
        read(folder, ROWS, CONFIG)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file(name: str, another: Another) -> None:
    folder = another()
    if name.startswith("tokenizer."):
        (folder / "tokenizer.model").unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=f"^{name}: named by the tokenizer, but is no regular file"):
        read(folder, ROWS, CONFIG)
