"""Keys and values: every row has a token, no two read the same, and what begins and ends a text is known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.llama_cpp import needs_llama_cpp
from helpers.vocabularies import MARKERS, Reader, gguf, write

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary import Vocabulary, read

ROWS = 2100
KEY = "tokenizer.ggml."
CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEMPLATE = "{%- if not sep_token is defined -%}{%- set sep_token = '<|end_of_sentence|>' -%}{%- endif -%}{{ sep_token }}"
PADDED = "100 of 2100 ids of the embedding have no token and are written as [PAD…]"

Another = Callable[..., Path]


def token(found: Vocabulary, i: int) -> tuple[Any, ...]:
    """Text, score and type."""
    return tuple(found.keys[KEY + name][i] for name in ("tokens", "scores", "token_type"))  # type: ignore[index]


def ids(found: Vocabulary) -> dict[str, Any]:
    """By llama.cpp's names: `{"bos": 1, ...}`."""
    end = "_token_id"
    return {key[len(KEY) : -len(end)]: value for key, value in found.keys.items() if key.endswith(end)}


# --- the table ---------------------------------------------------------------------------------------------------------


def test_keys_in_their_order_and_with_their_types(ernie: Path) -> None:
    found = read(ernie, ROWS, CONFIG)
    kinds = {key.removeprefix(KEY): type(value[0] if isinstance(value, tuple) else value) for key, value in found.keys.items()}
    assert list(kinds.items()) == [
        ("model", str), ("pre", str), ("tokens", str), ("scores", float), ("token_type", int), ("bos_token_id", int),
        ("eos_token_id", int), ("unknown_token_id", int), ("padding_token_id", int), ("add_bos_token", bool),
        ("add_space_prefix", bool),
    ]  # fmt: skip
    assert {len(value) for value in found.keys.values() if isinstance(value, tuple)} == {ROWS}
    assert found.notes == (PADDED,)
    assert token(found, 0) == ("<unk>", 0.0, 2)
    assert token(found, 2099) == ("[PAD2099]", -10000.0, 5)
    assert read(ernie, 2000, CONFIG).notes == ()
    assert ids(found) == {"bos": 1, "eos": 2, "unknown": 0, "padding": 0}


def test_user_defined_pieces_stay_what_they_are(ernie: Path) -> None:
    found = read(ernie, ROWS, CONFIG)
    assert [token(found, i)[::2] for i in (4, 5, 6)] == [(MARKERS[0], 4), (MARKERS[1], 4), ("0", 4)]


def test_added_tokens_replace_pieces(another: Another) -> None:
    folder = write(
        another(),
        added_tokens={"<|image|>": 2000, "<sep>": 2001, "[plain]": 2002, "<early>": 2003},
        tokenizer_config={
            "sep_token": {"content": "<sep>"},
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "1999": {"content": "<x>", "special": True},
                "2003": {"content": "<late>", "special": False},
            },
        },
    )
    found = read(folder, ROWS, CONFIG)
    assert token(found, 0) == ("<unk>", 0.0, 2)  # it is there already
    assert token(found, 1999) == ("<x>", -1000.0, 3)
    assert token(found, 2000) == ("<|image|>", -1000.0, 3)
    assert token(found, 2001) == ("<sep>", -1000.0, 3)
    assert token(found, 2002) == ("[plain]", -1000.0, 4)
    assert token(found, 2003) == ("<late>", -1000.0, 4)
    assert found.notes == (PADDED.replace("100", "96", 1),)


@needs_llama_cpp
def test_no_two_tokens_read_the_same(another: Another, tmp_path: Path) -> None:
    """llama.cpp would end the process; the token that was added last keeps its text."""
    folder = write(another(), added_tokens={"<cls>": 2000, "[PAD2050]": 2001, "[UNUSED3]": 2002, "a": 2003})
    found = read(folder, ROWS, CONFIG)
    assert token(found, 2000) == ("<cls>", -1000.0, 4)
    assert token(found, 3) == ("[[UNUSED3]]", -10000.0, 5)
    assert token(found, 2050)[0] == "[[PAD2050]]"
    assert len(set(found.keys[f"{KEY}tokens"])) == ROWS  # type: ignore[arg-type]
    assert found.notes[0].startswith("token 3 reads '<cls>' as token 2000 does, token ")
    with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
        assert llama.tokens("a<cls>") == [2003, 2000]

    # and that it would: elsewhere, for it takes the process along
    tokens = found.keys[f"{KEY}tokens"]
    gguf(tmp_path / "b.gguf", {**found.keys, f"{KEY}tokens": (*tokens[:-1], tokens[0])})  # type: ignore[index]
    line = f"from helpers.llama_cpp import Llama; Llama({str(tmp_path / 'b.gguf')!r}, vocab_only=True)"
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parents[1], env=env, capture_output=True, check=False)
    assert done.returncode < 0


# --- ends and beginnings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, {}, {"bos": 1, "eos": 2, "unknown": 0}),  # as Baidu's class has it
        ({"generation_config": {"eos_token_id": 7}}, {"eos_token_id": 8}, {"bos": 1, "eos": 7, "unknown": 0}),
        ({}, {"text_config": {"eos_token_id": 8}}, {"bos": 1, "eos": 8, "unknown": 0}),
        ({"tokenizer_config": {"eos_token": "<cls>"}}, {}, {"bos": 1, "eos": 3, "unknown": 0}),
        ({"tokenizer_config": {"eos_token": "<cls>"}}, {"eos_token_id": 8}, {"bos": 1, "eos": 8, "unknown": 0}),
        ({"special_tokens_map": {"bos_token": {"content": "<cls>"}}}, {}, {"bos": 3, "eos": 2, "unknown": 0}),
        ({"generation_config": {"eos_token_id": [2, 5]}}, {}, {"bos": 1, "eos": 2, "eot": 5, "unknown": 0}),
        ({"generation_config": {"eos_token_id": [2, 5, 7, 8]}}, {}, {"bos": 1, "eos": 2, "eot": 5, "eom": 7, "unknown": 0}),
        (
            {"generation_config": {"pad_token_id": -1, "eos_token_id": []}},
            {"eos_token_id": 9},
            {"bos": 1, "eos": 9, "unknown": 0},
        ),
    ],
)
def test_ids(files: dict[str, Any], config: dict[str, Any], expected: dict[str, int], another: Another) -> None:
    found = read(write(another(), **files), ROWS, config)
    assert ids(found) == expected
    assert found.notes[1:] == (("llama.cpp knows three ends of a text; [8] are left out",) if expected.get("eom") else ())


@pytest.mark.parametrize("value", [2100, "2", 2.0, True, [2, None, 2100]])
def test_an_id_that_is_none(value: Any, ernie: Path, another: Another) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: eos_token_id is .*, but the embedding has 2100 rows$"):
        read(ernie, ROWS, {"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"^generation_config\.json: pad_token_id is .*, but the embedding has 2100 rows$"):
        read(write(another(), generation_config={"pad_token_id": value}), ROWS, CONFIG)


@needs_llama_cpp
def test_an_answer_ends_where_the_chat_template_ends_it(another: Another, tmp_path: Path) -> None:
    """ERNIE's end of a text is </s>, but behind an answer its template prints another token."""
    folder = write(another(), tokenizer_config={"sep_token": MARKERS[1], "chat_template": TEMPLATE})
    found = read(folder, ROWS, CONFIG)
    assert ids(found)["eot"] == 5
    with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
        assert llama.ends() == [2, 5]
        assert llama.lib.llama_vocab_eos(llama.vocab) == 2
        assert llama.template() == TEMPLATE
    plain = write(folder, tokenizer_config={"sep_token": MARKERS[1], "chat_template": "{{ messages }}"})
    assert "eot" not in ids(read(plain, ROWS, CONFIG))


@needs_llama_cpp
@pytest.mark.parametrize("said", [True, False, None, "yes"])
def test_a_beginning_is_added_only_where_the_tokenizer_says_so(said: Any, another: Another, tmp_path: Path) -> None:
    found = read(write(another(), tokenizer_config={"add_bos_token": said}), ROWS, CONFIG)
    with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
        assert llama.tokens("a")[:-1] == ([1] if said is True else [])


def test_tokenizer_model_is_believed_about_spaces(another: Another) -> None:
    found = read(write(another(), tokenizer_config={"add_prefix_space": True}), ROWS, CONFIG)
    assert found.keys[f"{KEY}add_space_prefix"] is False
    assert found.notes[1:] == ("tokenizer_config.json: add_prefix_space is True, tokenizer.model says False, which is written",)


def test_special_tokens_without_an_id_are_noted(another: Another) -> None:
    given = {"additional_special_tokens": ["<|LOC_0|>", "<cls>", {"content": "<b>"}, "<c>", "<d>"], "mask_token": ""}
    found = read(write(another(), tokenizer_config=given), ROWS, CONFIG)
    assert found.notes[1:] == ("'<|LOC_0|>', '<b>', '<c>' and 1 more: named as special, but no file gives an id; left out",)
