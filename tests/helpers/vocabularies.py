"""A SentencePiece model as ERNIE's is, the smallest of GGUF files, and lines of text in two languages and code."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ernie_quant.ggml import Value
from ernie_quant.writers.gguf import lay_out
from helpers.llama_cpp import Llama

AUTO = Path(__file__).parents[2] / "calibration/auto"
ARCHITECTURE = "llama"
# what llama.cpp asks before it looks at the tokenizer
SIZES: dict[str, Value] = {
    "general.architecture": ARCHITECTURE,
    f"{ARCHITECTURE}.context_length": 64,
    f"{ARCHITECTURE}.embedding_length": 32,
    f"{ARCHITECTURE}.block_count": 1,
    f"{ARCHITECTURE}.feed_forward_length": 32,
    f"{ARCHITECTURE}.attention.head_count": 1,
    f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": 1e-5,
}
MARKERS = ("<|begin_of_sentence|>", "<|end_of_sentence|>")
DIGITS = tuple("0123456789")  # each a piece of its own, as in ERNIE's

# the smallest tokenizer.json
SMALL: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "added_tokens": [{"id": 4, "content": "<end>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}],
    "model": {"type": "BPE", "byte_fallback": False, "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]]},
}  # fmt: skip


def lines(*names: str) -> list[str]:
    """Of the texts that come with the package, without empty ones."""
    texts = [json.loads(line)["text"] for name in names for line in (AUTO / f"{name}.jsonl").read_text().splitlines()]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def sentencepiece_model(folder: Path, texts: list[str], size: int = 2000, **options: Any) -> Path:
    """tokenizer.model: BPE with bytes for what it does not know, no space before a text, digits and markers of their own."""
    import sentencepiece

    source = folder / "texts"
    source.write_text("\n".join(texts))
    given = {
        "vocab_size": size, "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "character_coverage": 0.99,
        "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "allow_whitespace_only_pieces": True,
        "user_defined_symbols": [*MARKERS, *DIGITS, "▁▁▁", "<mask:1>"], "control_symbols": ["<cls>"], "minloglevel": 2,
        "num_threads": 1, "max_sentence_length": 1 << 16,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(input=str(source), model_prefix=str(folder / "tokenizer"), **(given | options))
    source.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def gguf(path: Path, keys: Mapping[str, Value]) -> Path:
    """A file without tensors."""
    path.write_bytes(lay_out({}, SIZES | dict(keys)).head)
    return path


class Reader(Llama):
    """llama.cpp with the vocabulary of a file alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, vocab_only=True)
        self.size: int = self.lib.llama_vocab_n_tokens(self.vocab)

    def template(self) -> str | None:
        """The chat template."""
        self.lib.llama_model_chat_template.restype = ctypes.c_char_p
        self.lib.llama_model_chat_template.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        found = self.lib.llama_model_chat_template(self.model, None)
        return found.decode() if found is not None else None

    def ends(self) -> list[int]:
        """Every token at which it stops."""
        self.lib.llama_vocab_is_eog.restype = ctypes.c_bool
        self.lib.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        return [token for token in range(self.size) if self.lib.llama_vocab_is_eog(self.vocab, token)]

    def text(self, tokens: Iterable[int]) -> str:
        """What tokens stand for."""
        return b"".join(map(self.piece, tokens)).decode()


def write(folder: Path, **files: Any) -> Path:
    """`write(folder, tokenizer_config={...})`: JSON files."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
