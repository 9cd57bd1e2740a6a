"""A tokenizer of 256 tokens, one for a byte and one for the end of a text, and texts for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

EOS, EOS_ID = "<eos>", 255  # in the place of a byte that UTF-8 does not have


def byte_tokenizer(folder: Path, template: str | None = None) -> Path:
    """Its files, in a folder that gets nothing else."""
    vocab = {letter: number for number, letter in enumerate(_letters())} | {EOS: EOS_ID}
    backend = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": EOS_ID, "content": EOS, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))
    return folder


def _letters() -> Iterator[str]:
    """The printable letter that stands for each byte but the last, as GPT-2 chose them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    odd = 256
    for byte in range(255):
        yield chr(byte if byte in plain else odd)
        odd += byte not in plain


class Bytes:
    """The same without transformers."""

    eos: int | None = EOS_ID

    def ids(self, text: str) -> list[int]:
        return list(text.encode())

    def chat(self, messages: object) -> str:
        raise AssertionError


def lines(file: Path, *documents: object) -> Path:
    """A .jsonl file of texts, and of objects as they are."""
    values = [{"text": document} if isinstance(document, str) else document for document in documents]
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file
