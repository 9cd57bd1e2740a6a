"""tokenizer.model: read as SentencePiece reads it, and tokenized by llama.cpp as by SentencePiece."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from helpers.llama_cpp import needs_llama_cpp
from helpers.vocabularies import MARKERS, Reader, gguf, sentencepiece_model

from ernie_quant.errors import CheckpointError
from ernie_quant.ggml import Value
from ernie_quant.vocabulary import read, sentencepiece
from ernie_quant.vocabulary._table import NORMAL, USER_DEFINED, Token

ROWS = 2100
KEY = "tokenizer.ggml."
CONVERSATION = f"{MARKERS[0]}User: 12 + 345 = ?\nAssistant: 357{MARKERS[1]}User: thanks 谢谢\n"


def processor(folder: Path) -> Any:
    import sentencepiece as library

    return library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def differing(path: Path, keys: dict[str, Value], judge: Any, texts: list[str]) -> int:
    """In how many texts llama.cpp finds other tokens."""
    with Reader(gguf(path, keys)) as llama:
        return sum(llama.tokens(text) != judge.encode(text) for text in texts)


# --- by hand -----------------------------------------------------------------------------------------------------------

PIECE = "0a 0c  0a 03 3c 73 3e  15 00 00 80 bf  18 03".replace(" ", "")  # "<s>", -1.0, control
PLAIN = "0a 03  0a 01 61".replace(" ", "")  # "a", and neither a score nor a type
TRAINER, NORMALIZER = "12 02 18 02".replace(" ", ""), "1a 04 18 00 20 00".replace(" ", "")  # BPE; no space before, none removed


def test_a_model_of_two_pieces() -> None:
    """Piece, score and type; what a model leaves out has its .proto's default."""
    model = sentencepiece.parse(bytes.fromhex(PIECE + PLAIN + TRAINER + NORMALIZER))
    assert model.pieces == (Token("<s>", -1.0, 3), Token("a", 0.0, NORMAL))
    assert (model.kind, model.dummy_prefix, model.extra_removed, model.escaped) == (2, False, False, True)
    bare = sentencepiece.parse(bytes.fromhex(PLAIN))
    assert (bare.kind, bare.dummy_prefix, bare.extra_removed) == (1, True, True)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("", "it has no pieces"),
        ("0a", "it ends within a number"),
        ("0a05 0a01", "a field of 5 bytes where 2 are left"),
        ("0affffffffffffffffff01", r"a field of \d+ bytes where 0 are left"),
        ("0affffffffffffffffffff01", "a number of more than ten bytes"),
        ("0b", "a field of wire type 3"),
        ("0801", "field 1 has the wire type 0, not 2"),
        ("0a03 0a01ff", "piece 0 is not UTF-8"),
        ("0a02 0801", "the text of piece 0 has the wire type 0"),
        ("0a05 0a0161 1001", "the score of piece 0 is no float"),
        ("0a08 0a0161 150000c07f", "piece 0 has the type 1 and the score nan"),
        ("0a05 0a0161 1807", "piece 0 has the type 7"),
    ],
)
def test_what_is_no_model(data: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=f"^tokenizer.model: is no SentencePiece model: {why}"):
        sentencepiece.parse(bytes.fromhex(data))


def test_what_is_claimed_takes_neither_time_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "MAX_FIELDS", 100)
    monkeypatch.setattr(sentencepiece, "MAX_PIECES", 50)
    with pytest.raises(CheckpointError, match="more than 100 fields"):
        sentencepiece.parse(b"\x20\x01" * 101)
    with pytest.raises(CheckpointError, match="more than 50 pieces"):
        sentencepiece.parse(bytes.fromhex("0a00") * 51)


def test_a_file_that_is_too_large(another: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"^tokenizer.model: is too large: more than 1000 bytes"):
        read(another(), ROWS, {})


# --- against SentencePiece ---------------------------------------------------------------------------------------------


def test_every_piece_is_read_as_sentencepiece_reads_it(ernie: Path) -> None:
    judge = processor(ernie)
    model = sentencepiece.parse((ernie / "tokenizer.model").read_bytes())
    assert len(model.pieces) == judge.get_piece_size() == 2000
    assert [p.text for p in model.pieces] == [judge.id_to_piece(i) for i in range(2000)]
    assert [p.score for p in model.pieces] == [judge.get_score(i) for i in range(2000)]
    kinds = {2: judge.is_unknown, 3: judge.is_control, 5: judge.is_unused, 6: judge.is_byte}
    assert {i: p.kind for i, p in enumerate(model.pieces) if p.kind in kinds} == {
        i: kind for kind, holds in kinds.items() for i in range(2000) if holds(i)
    }
    assert not model.dummy_prefix
    assert not model.extra_removed


@needs_llama_cpp
def test_llama_cpp_finds_sentencepieces_tokens(ernie: Path, texts: list[str], tmp_path: Path) -> None:
    """And would not, were one of these keys missing or another."""
    judge = processor(ernie)
    keys = dict(read(ernie, ROWS, {}).keys)
    odd = [CONVERSATION, "  two, then   three", "tab\tand\r\n", "▁ a 🙂 é e\u0301 ﬁ", "<mask:1>0x1F", *MARKERS]
    every = texts + odd
    assert len(every) > 2500
    assert differing(tmp_path / "a.gguf", keys, judge, every) == 0
    assert any("<0x" in judge.id_to_piece(i) for text in every for i in judge.encode(text))

    spaced = {key: value for key, value in keys.items() if key != f"{KEY}add_space_prefix"}
    assert differing(tmp_path / "b.gguf", spaced, judge, every) > 0.9 * len(every)
    kinds = keys[f"{KEY}token_type"]
    assert isinstance(kinds, tuple)
    plain = keys | {f"{KEY}token_type": tuple(NORMAL if kind == USER_DEFINED else int(kind) for kind in kinds)}
    assert differing(tmp_path / "c.gguf", plain, judge, every) > 300
    with Reader(gguf(tmp_path / "d.gguf", plain)) as llama:
        assert len(llama.tokens(MARKERS[0])) > 1  # it falls to pieces


@needs_llama_cpp
def test_tokens_become_text_again(ernie: Path, texts: list[str], tmp_path: Path) -> None:
    with Reader(gguf(tmp_path / "a.gguf", read(ernie, ROWS, {}).keys)) as llama:
        assert llama.size == ROWS
        for text in [*texts[::20], CONVERSATION]:
            assert llama.text(llama.tokens(text)) == text


@needs_llama_cpp
def test_a_model_that_puts_a_space_before_a_text(texts: list[str], tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, texts, add_dummy_prefix=True, user_defined_symbols=[])
    found = read(tmp_path, ROWS, {})
    assert found.keys[f"{KEY}add_space_prefix"] is True
    assert differing(tmp_path / "a.gguf", dict(found.keys), processor(tmp_path), texts) == 0
    assert [note for note in found.notes if "PAD" not in note] == []


@needs_llama_cpp
def test_a_user_defined_piece_with_a_plain_space_is_never_found(texts: list[str], tmp_path: Path) -> None:
    """SentencePiece looks where spaces are letters already."""
    sentencepiece_model(tmp_path, texts, user_defined_symbols=["  ", "a b", "▁▁"])
    keys = dict(read(tmp_path, ROWS, {}).keys)
    judge = processor(tmp_path)
    odd = ["a b  c", "a b", "    ", "  x   y     z"]
    assert differing(tmp_path / "a.gguf", keys, judge, texts + odd) == 0


# --- what llama.cpp would read otherwise -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram"}, "is of the type unigram; llama.cpp reads ERNIE's tokenizers as BPE only"),
        ({"model_type": "char", "vocab_size": 320}, "is of the type characters"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words; llama.cpp does not"),
    ],
)
def test_refused(options: dict[str, Any], why: str, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    sentencepiece_model(tmp_path, texts[:100], options.pop("vocab_size", 500), **options)
    with pytest.raises(CheckpointError, match=f"^tokenizer.model: {re.escape(why)}"):
        read(tmp_path, ROWS, {})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites some characters first"),
        ({"remove_extra_whitespaces": True}, "removes spaces at the ends of a text"),
        ({"byte_fallback": False}, "has pieces for 0 of the 256 bytes"),
        ({"add_dummy_prefix": True}, "behind every piece of the type user-defined too"),
    ],
)
def test_noted(options: dict[str, Any], why: str, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    sentencepiece_model(tmp_path, texts[:100], 500, **options)
    assert [why in note for note in read(tmp_path, 500, {}).notes] == [True]


def test_more_pieces_than_rows(ernie: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer.model: has 2000 pieces, but the embedding has 1999 rows$"):
        read(ernie, 1999, {})


def test_pieces_that_are_there_twice_or_empty(tmp_path: Path) -> None:
    for piece, why in (("a", "'a', is there twice"), ("", "'', is empty")):
        body = b"\x0a" + bytes([len(piece)]) + piece.encode() + b"\x15" + struct.pack("<f", -1)
        (tmp_path / "tokenizer.model").write_bytes(bytes.fromhex(PLAIN + TRAINER) + b"\x0a" + bytes([len(body)]) + body)
        with pytest.raises(CheckpointError, match=f"^tokenizer.model: piece 1, {why}$"):
            read(tmp_path, ROWS, {})
