"""Tokens with a meaning of their own: added ones, beginnings and ends, and the template of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.jsonio import MAX_BYTES, read_object
from ernie_quant.vocabulary.tokens import Tokens

TOKENIZER_CONFIG, ADDED, GENERATION = "tokenizer_config.json", "added_tokens.json", "generation_config.json"
TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
FILES = (TOKENIZER_CONFIG, ADDED, GENERATION, TEMPLATE, TEMPLATE_JSON)
# llama.cpp's token types, and sentencepiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0
MOST = 1 << 24  # far above any vocabulary
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # in configs, and in GGUF's keys


def with_added(tokens: Tokens, added: Mapping[str, Any], said: Mapping[str, Any], rows: int) -> Tokens:
    """With added_tokens.json, then `added_tokens_decoder` of tokenizer_config.json, in the place of what they replace.

    Raises CheckpointError for one that has no row.
    """
    texts, kinds, scores = list(tokens.texts), list(tokens.kinds), list(tokens.scores)
    for number, text, is_special, file in _added(added, said):
        if not 0 <= number < min(rows, MOST):
            raise CheckpointError(f"{file}: the token {text[:80]!r} is number {number}, the embeddings have {rows} rows")
        more = range(len(texts), number + 1)
        texts += [""] * len(more)
        kinds += [UNUSED] * len(more)
        scores += [UNUSED_SCORE] * len(more) if tokens.scores else []
        if texts[number] != text or kinds[number] == NORMAL:
            texts[number], kinds[number] = text, CONTROL if is_special else USER_DEFINED
            if tokens.scores:
                scores[number] = ADDED_SCORE
    return replace(tokens, texts=tuple(texts), kinds=tuple(kinds), scores=tuple(scores))


def _added(added: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[tuple[int, str, bool, str]]:
    """Number, text, whether it is special, and the file that says so."""
    for text, number in added.items():
        if type(number) is not int:
            raise CheckpointError(f"{ADDED}: the number of {text[:80]!r} is {number!r:.40}")
        yield number, text, text.startswith("<|") and text.endswith("|>"), ADDED
    decoder = said.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isdecimal() and len(key) < 10 and isinstance(content, str) and content):
            raise CheckpointError(f"{TOKENIZER_CONFIG}: added_tokens_decoder has {key[:40]!r}: {entry!r:.80}")
        yield int(key), content, entry.get("special") is True, TOKENIZER_CONFIG


def ids(tokens: Tokens, said: Mapping[str, Any], *configs: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of beginning, end, unknown and padding: those of `configs`, the first that has one, else by their texts."""
    numbers = {text: number for number, text in enumerate(tokens.texts)}
    found = {}
    for name, key in NAMES.items():
        candidates: list[Any] = [_first(config.get(f"{name}_token_id")) for config in configs]
        token = said.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        candidates.append(numbers.get(token) if isinstance(token, str) else None)
        candidates += [tokens.unknown] if name == "unk" else []
        number = next((n for n in candidates if type(n) is int and 0 <= n < len(tokens.texts)), None)
        if number is not None:
            found[key] = number
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def chat_template(folder: Path, said: Mapping[str, Any]) -> str:
    """The template that writes a conversation; empty if there is none."""
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if isinstance(template, str):
        return template
    if (folder / TEMPLATE).is_file():
        try:
            with open(folder / TEMPLATE, "rb") as file:
                return file.read(MAX_BYTES).decode()
        except (OSError, ValueError):
            raise CheckpointError(f"{TEMPLATE}: cannot be read as UTF-8") from None
    if (folder / TEMPLATE_JSON).is_file():
        template = read_object(folder / TEMPLATE_JSON).get("chat_template")
    return template if isinstance(template, str) else ""
