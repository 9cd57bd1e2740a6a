"""tokenizer.json: byte-level BPE as the tokenizers library writes it.

llama.cpp knows ways to cut a text before BPE by name only (src/llama-vocab.cpp, tokenizer_pre); those of which the tokens are
known to be the same are here, others are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.jsonio import read_object
from ernie_quant.vocabulary.special import CONTROL, MOST, NORMAL, UNUSED, USER_DEFINED
from ernie_quant.vocabulary.tokens import Tokens


def read(path: Path) -> Tokens:
    """The tokens of a file. Raises CheckpointError."""
    said = read_object(path)
    model = said.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise CheckpointError(f"{path.name}: its model is no BPE; put tokenizer.model beside it, if there is one")
    if model.get("byte_fallback"):
        raise CheckpointError(f"{path.name}: is made of a SentencePiece model; put that, tokenizer.model, beside it")
    pre = _pre(path.name, said)
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(type(number) is int and 0 <= number < MOST for number in vocab.values()):
        raise CheckpointError(f"{path.name}: its vocab is no table of texts and numbers")
    kinds = dict.fromkeys(vocab.values(), NORMAL)
    texts = {number: text for text, number in vocab.items()}
    for number, text, special in _added(path.name, said.get("added_tokens") or []):
        texts[number], kinds[number] = text, CONTROL if special else USER_DEFINED
    if len(texts) < max(texts, default=0) // 2:
        raise CheckpointError(f"{path.name}: has {len(texts)} tokens, with numbers up to {max(texts)}")
    numbers = range(max(texts, default=-1) + 1)
    return Tokens(
        path.name, "gpt2", pre, tuple(texts.get(n, "") for n in numbers), tuple(kinds.get(n, UNUSED) for n in numbers),
        merges=_merges(path.name, merges),
    )  # fmt: skip


def _added(name: str, entries: Any) -> list[tuple[int, str, bool]]:
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case {"id": int(number), "content": str(text)} if 0 <= number < MOST and text:
                found.append((number, text, entry.get("special") is True))
            case _:
                raise CheckpointError(f"{name}: added_tokens has {entry!r:.80}")
    return found


def _merges(name: str, merges: Any) -> tuple[str, ...]:
    """`a b` each; in newer files they are pairs."""
    found = []
    for merge in merges if isinstance(merges, list) else [merges]:
        match merge:
            case str():
                found.append(merge)
            case [str(one), str(two)] if " " not in one + two:
                found.append(f"{one} {two}")
            case _:
                raise CheckpointError(f"{name}: merges has {merge!r:.80}")
    return tuple(found)


def _pre(name: str, said: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which a text is cut first. Raises CheckpointError."""
    if said.get("normalizer"):
        raise CheckpointError(f"{name}: its normalizer {said['normalizer']!r:.80} is none that llama.cpp has")
    steps = said.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    shapes = [
        (step.get("type"), step.get("individual_digits"), step.get("add_prefix_space"), step.get("use_regex", True))
        for step in steps
        if isinstance(step, dict)
    ]
    digits, cut = ("Digits", True, None, True), ("ByteLevel", None, False, True)
    if shapes == [digits, cut]:
        return "smollm"
    if shapes == [cut]:
        return "gpt-2"
    words = ", ".join(str(shape[0]) for shape in shapes) or "nothing"
    raise CheckpointError(f"{name}: cuts a text by {words} first; known here are ByteLevel, and Digits one by one before it")
