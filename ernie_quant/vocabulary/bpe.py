"""tokenizer.json with a byte-level BPE: https://github.com/huggingface/tokenizers

How a text is cut into words before it is merged has names in llama.cpp, one for each way that it knows; only those are
taken here whose tokens were compared. Another one would load and give wrong tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ernie_quant.errors import CheckpointError
from ernie_quant.vocabulary._files import BACKEND, PIECES, Files
from ernie_quant.vocabulary._table import NORMAL, Added, Loaded, Token

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# what a pre-tokenizer does -> what llama.cpp calls it
PRE = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}
# of the model: what llama.cpp does not do
FOREIGN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
# of an added token: what llama.cpp does not do
UNSEEN = ("lstrip", "rstrip", "single_word")


def load(files: Files, rows: int) -> Loaded:
    """tokenizer.json as llama.cpp knows it. Raises CheckpointError, also for what llama.cpp would read otherwise."""
    backend = files.table(BACKEND)
    model = backend.get("model")
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{BACKEND}: has no model")
    _check(model, backend.get("normalizer"))
    vocab = _vocab(model, rows)
    merges = tuple(_merges(model, vocab))
    added, notes = _added(backend)
    pre = _pre(backend.get("pre_tokenizer"), merges)
    return Loaded("gpt2", pre, {i: Token(text, 0.0, NORMAL) for text, i in vocab.items()}, added, merges, False, notes)


def _check(model: Mapping[str, Any], normalizer: object) -> None:
    if model.get("byte_fallback"):
        raise CheckpointError(f"{BACKEND}: was made of a SentencePiece model; put its {PIECES} there, which is read instead")
    if (kind := model.get("type", "BPE")) != "BPE":
        raise CheckpointError(f"{BACKEND}: holds a model of the type {kind!r:.60}; BPE on bytes is read, and {PIECES}")
    if said := [name for name in FOREIGN if model.get(name)]:
        raise CheckpointError(f"{BACKEND}: its model has {', '.join(said)}; llama.cpp does not know that")
    if normalizer is not None:
        raise CheckpointError(f"{BACKEND}: rewrites texts first, by {_shown(normalizer)}; llama.cpp does not")


def _vocab(model: Mapping[str, Any], rows: int) -> dict[str, int]:
    """Text -> id."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{BACKEND}: its model has no vocab")
    if len(vocab) > rows:
        raise CheckpointError(f"{BACKEND}: has {len(vocab)} tokens, but the embedding has {rows} rows")
    names: dict[int, str] = {}
    for text, i in vocab.items():
        if type(i) is not int or not 0 <= i < rows:
            raise CheckpointError(f"{BACKEND}: {text!r:.60} has the id {i!r:.40}, but the embedding has {rows} rows")
        if i in names:
            raise CheckpointError(f"{BACKEND}: {names[i]!r:.60} and {text!r:.60} have the same id, {i}")
        names[i] = text
    return vocab


def _merges(model: Mapping[str, Any], vocab: Collection[str]) -> Iterator[str]:
    """`left right`, the first to be merged first."""
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise CheckpointError(f"{BACKEND}: its merges are no list")
    seen: set[str] = set()
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(half, str) and half for half in pair)):
            raise CheckpointError(f"{BACKEND}: {merge!r:.80} is no merge of two tokens")
        text = " ".join(pair)
        if " " in pair[0] + pair[1] or text in seen:
            raise CheckpointError(f"{BACKEND}: the merge {merge!r:.80} {'is there twice' if text in seen else 'holds a space'}")
        if strange := [name for name in (*pair, "".join(pair)) if name not in vocab]:
            raise CheckpointError(f"{BACKEND}: the merge {merge!r:.80} needs {strange[0]!r:.60}, which is no token")
        seen.add(text)
        yield text


def _added(backend: Mapping[str, Any]) -> tuple[tuple[Added, ...], tuple[str, ...]]:
    tokens = backend.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise CheckpointError(f"{BACKEND}: its added_tokens are no list")
    found, unseen = [], []
    for token in tokens:
        i, text = (token.get("id"), token.get("content")) if isinstance(token, dict) else (None, None)
        if type(i) is not int or not isinstance(text, str):
            raise CheckpointError(f"{BACKEND}: {token!r:.80} is no added token")
        found.append(Added(i, text, bool(token.get("special")), BACKEND))
        if any(token.get(name) for name in UNSEEN):
            unseen.append(text)
    some = f"{', '.join(f'{text!r:.40}' for text in unseen[:3])}{', …' if len(unseen) > 3 else ''}"
    return tuple(found), (f"{some}: take spaces beside them, or stand alone; in llama.cpp they do not",) if unseen else ()


def _pre(pre_tokenizer: object, merges: Collection[str]) -> str:
    """What llama.cpp calls it. Raises CheckpointError, with its name and those that are known."""
    steps = list(_steps(pre_tokenizer))
    if not merges and steps in ([BYTE_LEVEL], [BYTE_LEVEL | {"use_regex": False}]):
        return "gpt-2"  # every byte is a token, wherever words are cut
    for name, known in PRE.items():
        if steps == known:
            return name
    raise CheckpointError(f"{BACKEND}: cuts texts into words by {_shown(pre_tokenizer)}; known are {', '.join(PRE)}")


def _steps(value: object) -> Iterator[dict[str, Any]]:
    """One after the other, with what is said when nothing is; trim_offsets moves no token."""
    if not isinstance(value, Mapping):
        yield {"type": value}
    elif value.get("type") == "Sequence" and isinstance(value.get("pretokenizers"), list):
        for inner in value["pretokenizers"]:
            yield from _steps(inner)
    elif value.get("type") == "ByteLevel":
        yield {"add_prefix_space": True, "use_regex": True} | {k: v for k, v in value.items() if k != "trim_offsets"}
    else:
        yield dict(value)


def _shown(value: object) -> str:
    return f"{json.dumps(value):.200}"
