"""The table of all tokens, one for every row of the embedding, in which no two read the same.

llama.cpp ends the process where two tokens of a file read the same, and reads a text up to its first zero byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ernie_quant.errors import CheckpointError

# llama_token_type of llama.h, and ModelProto.SentencePiece.Type with the same numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED_SCORE, NO_SCORE = -1000.0, -10000.0  # behind every merge, as llama.cpp's own converter writes them
MAX_ROWS = 1 << 21  # ERNIE has 103424
SPACE = "▁"  # SentencePiece's
_looks_special = re.compile(r"<\|.*\|>", re.DOTALL).fullmatch


@dataclass(frozen=True)
class Token:
    """Its text, how early it is merged, and its type."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Added:
    """A token that the file `who` puts at an id, in the place of what is there."""

    id: int
    text: str
    special: bool
    who: str


@dataclass(frozen=True)
class Loaded:
    """What a tokenizer's main file says, as llama.cpp's keys call it; `merges` is None for SentencePiece."""

    model: str
    pre: str
    tokens: Mapping[int, Token]
    added: tuple[Added, ...]
    merges: tuple[str, ...] | None
    space_prefix: bool
    notes: tuple[str, ...]


def complete(tokens: Mapping[int, Token], added: Sequence[Added], rows: int) -> tuple[list[Token], list[str]]:
    """A token for every id below `rows`, and notes. Raises CheckpointError for a token past them or one without a text."""
    table = dict(tokens)
    for new in added:
        if not 0 <= new.id < rows:
            raise CheckpointError(f"{new.who}: {new.text!r:.60} has the id {new.id}, but the embedding has {rows} rows")
        table[new.id] = _replacing(table.get(new.id), new)
    for i, token in table.items():
        if not token.text or "\0" in token.text:
            raise CheckpointError(f"token {i}, {token.text!r:.60}, {'holds a zero byte' if token.text else 'is empty'}")
    notes = _tell_apart(table, [new.id for new in added])
    if missing := rows - len(table):
        notes.append(f"{missing} of {rows} ids of the embedding have no token and are written as [PAD…]")
    taken = {token.text for token in table.values()}
    return [table.get(i) or Token(_free(f"[PAD{i}]", taken), NO_SCORE, UNUSED) for i in range(rows)], notes


def _replacing(old: Token | None, new: Added) -> Token:
    if old and old.text == new.text and old.kind == UNKNOWN:
        return old
    return Token(new.text, ADDED_SCORE, CONTROL if new.special or _looks_special(new.text) else USER_DEFINED)


def _tell_apart(table: dict[int, Token], added: Iterable[int]) -> list[str]:
    """Give other names to tokens that read as another one. Returns notes.

    The text stays with the one that was added last, then with a user-defined one, then with the first.
    """
    last_is_first = sorted(table.items(), key=lambda item: (item[1].kind == USER_DEFINED, -item[0]))
    owner = {token.text: i for i, token in last_is_first} | {table[i].text: i for i in added}
    taken = set(owner)
    others = [i for i, token in sorted(table.items()) if owner[token.text] != i]
    said = [f"token {i} reads {table[i].text!r:.60} as token {owner[table[i].text]} does" for i in others]
    for i in others:
        table[i] = Token(_free(f"[UNUSED{i}]", taken), NO_SCORE, UNUSED)
    more = f", and {len(said) - 3} more" if len(said) > 3 else ""
    return [f"{', '.join(said[:3])}{more}; llama.cpp takes no text twice: written as {table[others[0]].text}…"] if others else []


def _free(text: str, taken: set[str]) -> str:
    while text in taken:
        text = f"[{text}]"
    taken.add(text)
    return text
