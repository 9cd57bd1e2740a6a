"""What a checkpoint's tokenizer is in a GGUF file, for llama.cpp: the keys `tokenizer.*` and their values.

Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and `src/llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.ggml import Value
from ernie_quant.vocabulary import bpe, sentencepiece
from ernie_quant.vocabulary._files import BACKEND, FILES, PIECES, SETTINGS, Files
from ernie_quant.vocabulary._special import added_tokens, special_ids, without_id
from ernie_quant.vocabulary._table import MAX_ROWS, Loaded, Token, complete
from ernie_quant.vocabulary._template import chat_template

__all__ = ["FILES", "MODEL", "NO_VOCABULARY", "Vocabulary", "read"]

MODEL, NO_VOCABULARY = "tokenizer.ggml.model", "no_vocab"


@dataclass(frozen=True)
class Vocabulary:
    """Keys and values in the order in which they are written, and notes for a report.

    Beside them llama.cpp needs `ARCHITECTURE.vocab_size`, the rows, where `MODEL` is `NO_VOCABULARY`.
    """

    keys: Mapping[str, Value]
    notes: tuple[str, ...]


def read(folder: Path, rows: int, config: Mapping[str, Any], *, links: bool = False) -> Vocabulary:
    """The tokenizer in `folder`, for an embedding of `rows` rows; `config` is config.json.

    Raises CheckpointError for a file that is broken, or whose tokens would be others in llama.cpp. Without a tokenizer the
    keys say so, and a note.
    """
    files = Files(folder, links)
    if not 0 < rows <= MAX_ROWS:
        raise CheckpointError(f"an embedding of {rows} rows; a tokenizer may have {MAX_ROWS} tokens")
    if files.has(PIECES):
        return _vocabulary(files, rows, config, sentencepiece.load(files, rows))
    if files.has(BACKEND):
        return _vocabulary(files, rows, config, bpe.load(files, rows))
    note = f"no tokenizer ({PIECES}, {BACKEND}): llama.cpp loads the file, but takes and gives ids, not texts"
    return Vocabulary({MODEL: NO_VOCABULARY}, (note,))


def _vocabulary(files: Files, rows: int, config: Mapping[str, Any], loaded: Loaded) -> Vocabulary:
    tokens, of_table = complete(loaded.tokens, [*loaded.added, *added_tokens(files)], rows)
    template, of_template = chat_template(files)
    ids, of_ids = special_ids(files, config, tokens, template)
    notes = (*loaded.notes, *of_table, *without_id(files, tokens), *of_ids, *of_template, *_about_spaces(files, loaded))
    keys: dict[str, Value] = {MODEL: loaded.model, "tokenizer.ggml.pre": loaded.pre}
    keys |= _arrays(tokens, loaded)
    keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    # llama.cpp takes true for both where a file says nothing
    keys["tokenizer.ggml.add_bos_token"] = files.settings().get("add_bos_token") is True
    keys["tokenizer.ggml.add_space_prefix"] = loaded.space_prefix
    return Vocabulary(keys | ({"tokenizer.chat_template": template} if template else {}), notes)


def _arrays(tokens: list[Token], loaded: Loaded) -> dict[str, Value]:
    arrays: dict[str, Value] = {"tokenizer.ggml.tokens": tuple(token.text for token in tokens)}
    if loaded.merges is None:
        arrays["tokenizer.ggml.scores"] = tuple(token.score for token in tokens)
    arrays["tokenizer.ggml.token_type"] = tuple(token.kind for token in tokens)
    return arrays if loaded.merges is None else arrays | {"tokenizer.ggml.merges": loaded.merges}


def _about_spaces(files: Files, loaded: Loaded) -> list[str]:
    """Baidu's programs ask SentencePiece alone, which asks tokenizer.model."""
    said = files.settings().get("add_prefix_space")
    differs = loaded.merges is None and isinstance(said, bool) and said != loaded.space_prefix
    return [f"{SETTINGS}: add_prefix_space is {said}, {PIECES} says {loaded.space_prefix}, which is written"] if differs else []
