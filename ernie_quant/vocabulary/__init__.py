"""A checkpoint's tokenizer as the keys of a GGUF file, by which llama.cpp makes the same tokens of a text.

Source: ggml-org/llama.cpp, src/llama-vocab.cpp. Two of its defaults would change every text without a word, a token before it
and a space; both are always written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.ggml import Value
from ernie_quant.jsonio import read_object
from ernie_quant.vocabulary import bpe, sentencepiece, special
from ernie_quant.vocabulary.tokens import Tokens

SENTENCEPIECE, TOKENIZERS = "tokenizer.model", "tokenizer.json"
FILES = (SENTENCEPIECE, TOKENIZERS, *special.FILES)
NO_VOCABULARY = "no_vocab"
MODEL = "tokenizer.ggml.model"


@dataclass(frozen=True)
class Vocabulary:
    """Keys in the order in which they are written, and what is worth a line."""

    keys: Mapping[str, Value]
    notes: tuple[str, ...] = ()


def read(folder: Path, rows: int, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer in a folder, for embeddings of so many rows. Raises CheckpointError."""
    if (folder / SENTENCEPIECE).is_file():
        tokens = sentencepiece.read(folder / SENTENCEPIECE)
    elif (folder / TOKENIZERS).is_file():
        tokens = bpe.read(folder / TOKENIZERS)
    else:
        note = f"no tokenizer ({SENTENCEPIECE} or {TOKENIZERS}) is there: programs take numbers of tokens only, no text"
        return Vocabulary({MODEL: NO_VOCABULARY}, (note,))
    said = _optional(folder, special.TOKENIZER_CONFIG)
    tokens = special.with_added(tokens, _optional(folder, special.ADDED), said, rows)
    tokens, notes = _filled(tokens, rows)
    ids = special.ids(tokens, said, _optional(folder, special.GENERATION), config)
    keys: dict[str, Value] = {
        MODEL: tokens.model,
        "tokenizer.ggml.pre": tokens.pre,
        "tokenizer.ggml.tokens": tokens.texts,
        **({"tokenizer.ggml.scores": tokens.scores} if tokens.scores else {}),
        "tokenizer.ggml.token_type": tokens.kinds,
        **({"tokenizer.ggml.merges": tokens.merges} if tokens.merges else {}),
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()},
        "tokenizer.ggml.add_bos_token": said.get("add_bos_token") is True,
        "tokenizer.ggml.add_space_prefix": _flag(said, "add_prefix_space", tokens.space_prefix),
    }
    if template := special.chat_template(folder, said):
        keys["tokenizer.chat_template"] = template
    return Vocabulary(keys, notes)


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_object(folder / name) if (folder / name).is_file() else {}


def _flag(said: Mapping[str, Any], key: str, default: bool) -> bool:
    value = said.get(key)
    return value if isinstance(value, bool) else default


def _filled(tokens: Tokens, rows: int) -> tuple[Tokens, tuple[str, ...]]:
    """A text for every row, no two alike: llama.cpp stops at a second one."""
    if len(tokens.texts) > rows:
        raise CheckpointError(f"{tokens.file}: has {len(tokens.texts)} tokens, the embeddings have {rows} rows")
    missing = range(len(tokens.texts), rows)
    texts, kinds = [*tokens.texts, *("" for _ in missing)], [*tokens.kinds, *(special.UNUSED for _ in missing)]
    scores = [*tokens.scores, *(special.UNUSED_SCORE for _ in missing)] if tokens.scores else []
    seen: dict[str, int] = {}
    twice = []
    for number, text in enumerate(texts):
        if not text or seen.setdefault(text, number) != number:
            twice += [number] if text else []
            texts[number], kinds[number] = f"[PAD{number}]", special.UNUSED
            if scores:
                scores[number] = special.UNUSED_SCORE
    notes = [f"{tokens.file}: {len(twice)} tokens repeat the text of another, the first is {twice[0]}: unused"] if twice else []
    return replace(tokens, texts=tuple(texts), kinds=tuple(kinds), scores=tuple(scores)), tuple(notes)
