"""Files that somebody broke, by chance or on purpose: read, or refused in one line, and soon."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.llama_cpp import needs_llama_cpp
from helpers.vocabularies import SMALL, Reader, gguf

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary import Vocabulary, read

ROWS, FEW = 2100, 6
# <unk>, <s>, </s> and a, made by BPE
TINY = bytes.fromhex("0a090a053c756e6b3e18020a070a033c733e18030a080a043c2f733e18030a030a016112021802")
CONFIG = {"bos_token_id": 1, "eos_token_id": 2}
STRANGE = [
    None, True, -1, 1 << 70, 0.5, 1e308, "", "\0", "x" * 10_000, "\ud800",
    [], {}, [[]], {"a": None}, [1], ["a"], {"content": ""},
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "add_bos_token": False, "bos_token": "<s>", "eos_token": {"content": "</s>"},
    "additional_special_tokens": ["<a>", {"content": "<b>"}],
    "added_tokens_decoder": {"4": {"content": "<x>", "special": True}, "5": {"content": "<y>"}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}], "model_max_length": 1e30,
}  # fmt: skip


def attempt(folder: Path, rows: int) -> Vocabulary | None:
    """What is read, if it is fit for llama.cpp; None if it is refused in one short line."""
    start, found, why = time.process_time(), None, ""
    try:
        found = read(folder, rows, CONFIG)
    except CheckpointError as error:
        why = str(error)
    assert bool(found) != bool(why)
    assert "\n" not in why
    assert len(why) < 600
    assert time.process_time() - start < 5
    if found:
        tokens = found.keys["tokenizer.ggml.tokens"]
        assert isinstance(tokens, tuple)
        assert len(set(tokens)) == rows
        assert all(isinstance(t, str) and t and "\0" not in t and t.encode() for t in tokens)
        assert all(value < rows for key, value in found.keys.items() if key.endswith("_token_id") and isinstance(value, int))
    return found


def broken(data: bytes, draw: random.Random) -> bytes:
    """Cut off, a bit turned, bytes put in or left out, a length that is too long."""
    at = draw.randrange(len(data))
    match draw.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + draw.randbytes(draw.randrange(1, 12)) + data[at:]
        case 3:
            return data[:at] + data[at + draw.randrange(1, 12) :]
        case _:
            return data[:at] + b"\xff" * 9 + b"\x01" + data[at:]


def test_a_broken_tokenizer_model(another: Any) -> None:
    """Most changes break it; one to a letter or a score does not."""
    folder = another()
    whole = (folder / "tokenizer.model").read_bytes()[:8000]  # 600 pieces, cut within one
    tail = (folder / "tokenizer.model").read_bytes()[-700:]
    read_, refused = 0, 0
    for n in range(400):
        draw = random.Random(n)
        data = (folder / "tokenizer.model").write_bytes(broken(whole, draw) if n % 2 else whole[:5] + broken(tail, draw))
        assert data
        found = attempt(folder, ROWS)
        read_, refused = read_ + (found is not None), refused + (found is None)
    assert refused > 200


@needs_llama_cpp
def test_what_is_read_of_a_broken_one_loads(another: Any, tmp_path: Path) -> None:
    folder = another()
    whole = (folder / "tokenizer.model").read_bytes()
    loaded = 0
    for n in range(60):
        draw = random.Random(n)
        at = draw.randrange(len(whole))
        (folder / "tokenizer.model").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        if found := attempt(folder, ROWS):
            with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
                assert llama.size == ROWS
            loaded += 1
    assert 10 < loaded < 60


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value in a JSON text."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


def test_strange_values_in_every_place_of_tokenizer_json(tmp_path: Path) -> None:
    seen = set()
    for path in places(SMALL):
        for value in STRANGE:
            (tmp_path / "tokenizer.json").write_text(json.dumps(changed(SMALL, path, value)))
            seen.add(attempt(tmp_path, FEW) is None)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "chat_template"])
def test_strange_values_in_every_place_of_the_other_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(TINY)
    said = {
        "tokenizer_config": SETTINGS, "special_tokens_map": SETTINGS, "added_tokens": {"<|a|>": 4, "b": 5},
        "generation_config": {"eos_token_id": [2, 5, 4], "pad_token_id": 0}, "chat_template": {"chat_template": "x"},
    }[name]  # fmt: skip
    for path in places(said):
        for value in STRANGE:
            (tmp_path / f"{name}.json").write_text(json.dumps(changed(said, path, value)))
            attempt(tmp_path, FEW)
    for text in ("[" * 100_000, "[]", "{", '{"a": 1, "a": 2}', "\ufeff{}", "nul", '{"a": ' * 70 + "1" + "}" * 70):
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"^{name}.json: is "):
            read(tmp_path, FEW, CONFIG)


def test_many_added_tokens_and_few_rows(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(SMALL))
    (tmp_path / "added_tokens.json").write_text(json.dumps({f"<{i}>": i % FEW for i in range(200_000)}))
    found = attempt(tmp_path, FEW)
    assert found
    assert len(str(found.notes)) < 1000
