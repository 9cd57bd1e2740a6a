"""The tokens of a vocabulary, whatever file they were read from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """Texts, kinds and scores (or merges) of the tokens 0, 1, …; an empty text is one that the file does not have.

    `model` and `pre`: what llama.cpp calls the algorithm and the way to cut a text before it. `unknown`: the token for what has
    none. `space_prefix`: does a space come before a text?
    """

    file: str
    model: str
    pre: str
    texts: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    unknown: int | None = None
    space_prefix: bool = False
