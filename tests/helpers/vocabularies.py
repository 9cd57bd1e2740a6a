"""A SentencePiece model as ERNIE's is, the smallest of GGUF files, and lines of text in two languages and code."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_quant.vocabulary import Value, type_of

AUTO = Path(__file__).parents[2] / "calibration/auto"
KINDS = {"i32": 5, "u32": 4, "f32": 6, "bool": 7, "string": 8, "array": 9}  # of GGUF
ARCHITECTURE = "llama"
# what llama.cpp asks before it looks at the tokenizer
SIZES = {
    "general.architecture": ARCHITECTURE,
    f"{ARCHITECTURE}.context_length": 64,
    f"{ARCHITECTURE}.embedding_length": 32,
    f"{ARCHITECTURE}.block_count": 1,
    f"{ARCHITECTURE}.feed_forward_length": 32,
    f"{ARCHITECTURE}.attention.head_count": 1,
    f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": struct.pack("<If", KINDS["f32"], 1e-5),
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


def gguf(path: Path, keys: Mapping[str, Value | bytes]) -> Path:
    """A file without tensors; a value of bytes is one as it is stored, with its type before it."""
    table = SIZES | dict(keys)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(table))
    path.write_bytes(head + b"".join(_text(key) + _value(value) for key, value in table.items()))
    return path


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    kind, *of = type_of(value)
    values = value if isinstance(value, tuple) else (value,)
    head = struct.pack("<IIQ", KINDS[kind], KINDS[of[0]], len(values)) if of else struct.pack("<I", KINDS[kind])
    return head + b"".join(_scalar(of[0] if of else kind, one) for one in values)


def _scalar(kind: str, value: Any) -> bytes:
    return _text(value) if kind == "string" else struct.pack({"i32": "<i", "u32": "<I", "f32": "<f", "bool": "<?"}[kind], value)


def write(folder: Path, **files: Any) -> Path:
    """`write(folder, tokenizer_config={...})`: JSON files."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
