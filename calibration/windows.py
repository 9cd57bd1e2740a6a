"""Windows of token ids, of which any beginning has its share of every kind of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.calibration.texts import Text, read_text, tokens
from ernie_quant.calibration.tokenizer import Tokenizer

from ernie_quant.errors import TextError

if TYPE_CHECKING:
    import torch

AUTO = "auto"  # the texts that come with the package
FOLDER = Path(__file__).parent / AUTO
LENGTH = 512  # tokens of a window
JUDGE_AFTER = 7  # windows for fitting, then one for judging
SEED = 0

# what the windows of `auto` are shared among: group, its share, and how its tokens are shared among its files
# fmt: off
LANGUAGES = ("german", "french", "spanish", "portuguese", "russian", "japanese", "korean", "arabic", "hindi", "indonesian",
             "turkish", "vietnamese")
SHARES: tuple[tuple[str, float, Mapping[str, float]], ...] = (
    ("english",         0.22, {"english": 1}),
    ("chinese",         0.22, {"chinese": 2, "chinese_mathematics": 1, "chinese_dialogue": 1}),
    ("other languages", 0.20, dict.fromkeys(LANGUAGES, 1)),
    ("code",            0.16, {"code": 1}),
    ("dialogue",        0.12, {"dialogue": 1}),
    ("mathematics",     0.08, {"mathematics": 1}),
)
# fmt: on


@dataclass(frozen=True)
class Windows:
    """`ids`: int64 [n, length]; `judged`: bool [n], windows that take no part in a fit; `groups`: what each is of.

    `description`: JSON that says which texts these were, of which hashes, and how many tokens of each.
    """

    ids: torch.Tensor
    judged: torch.Tensor
    groups: tuple[str, ...]
    description: dict[str, Any]


@dataclass
class _Group:
    """Texts whose windows are taken in turn with those of other groups."""

    name: str
    share: float
    left: Iterator[_Window]


@dataclass(frozen=True)
class _Window:
    ids: list[int]
    counts: Counter[str]  # text -> tokens


def windows(
    tokenizer: Tokenizer, source: Sequence[Path] | str, wanted: int, *, length: int = LENGTH, seed: int = SEED, judge: bool = True
) -> Windows:  # fmt: skip
    """`wanted` tokens for fitting, rounded up to whole windows, and with `judge` one more window for every 7 of these.

    `source`: `AUTO`, or files that have equal shares. Documents are shuffled by the seed and packed end to end; a group
    that has run out is made up for by the others. Raises TextError: fewer tokens than are wanted, no text, no UTF-8.
    """
    import torch

    fits = max(1, -(-wanted // length))
    judged = _judged(fits) if judge else [False] * fits
    texts, groups = _groups(tokenizer, source, length, seed)
    found = list(_mixed(groups, judged))
    if len(found) < len(judged):
        raise TextError(_too_few(source, found, judged, length, wanted))
    counts: Counter[str] = sum((window.counts for _, window in found), Counter())
    description = {
        "name": AUTO if source == AUTO else ", ".join(text.name for text in texts),
        "sha256": {text.name: text.sha256 for text in texts},
        "tokens": fits * length, "judging_tokens": (len(judged) - fits) * length, "window": length, "seed": seed,
        "tokens_of": {text.name: counts[text.name] for text in texts},
    }  # fmt: skip
    ids = torch.tensor([window.ids for _, window in found], dtype=torch.int64)
    return Windows(ids, torch.tensor(judged), tuple(name for name, _ in found), description)


def hashes(source: Sequence[Path] | str) -> dict[str, str]:
    """sha256 of the texts, by name. Raises TextError."""
    files = source if not isinstance(source, str) else [FOLDER / f"{kind}.jsonl" for _, _, kinds in SHARES for kind in kinds]
    return {text.name: text.sha256 for text in map(read_text, files)}


def beginning(tokenizer: Tokenizer, file: Path, count: int, length: int = LENGTH) -> tuple[Text, torch.Tensor]:
    """The first `count` windows of a text, int64 [count, length]. Raises TextError where it is shorter."""
    import torch

    text = read_text(file)
    ids: list[int] = []
    for document in text.documents:
        for piece in tokens(document, tokenizer):
            ids += piece
        if len(ids) >= count * length:
            return text, torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    raise TextError(f"{file}: has {len(ids)} tokens, {count} windows of {length} are {count * length}; ask for fewer (--tokens)")


def _judged(fits: int) -> list[bool]:
    """After every 7 windows for fitting one for judging, and one at the end."""
    pattern = []
    for number in range(1, fits + 1):
        pattern += [False, True] if number % JUDGE_AFTER == 0 or number == fits else [False]
    return pattern


def _groups(tokenizer: Tokenizer, source: Sequence[Path] | str, length: int, seed: int) -> tuple[list[Text], list[_Group]]:
    """All texts, and groups of them."""
    if isinstance(source, str):
        table = [(name, share, {read_text(FOLDER / f"{kind}.jsonl"): weight for kind, weight in kinds.items()})
                 for name, share, kinds in SHARES]  # fmt: skip
    elif len({file.name for file in source}) < len(source):
        raise TextError(f"two texts are called {Counter(file.name for file in source).most_common(1)[0][0]}; rename one")
    else:
        table = [(file.name, 1.0, {read_text(file): 1.0}) for file in source]
    groups = [_Group(name, share, _packed(weights, tokenizer, length, seed)) for name, share, weights in table]
    return [text for _, _, weights in table for text in weights], groups


def _packed(weights: Mapping[Text, float], tokenizer: Tokenizer, length: int, seed: int) -> Iterator[_Window]:
    """Windows of a group, whose next document is always of the text that has had least for its weight."""
    left = {text: iter(text.shuffled(seed)) for text in weights}
    had = dict.fromkeys(weights, 0)
    ids: list[int] = []
    names: list[str] = []  # of the text of every token
    while left:
        text = min(left, key=lambda t: had[t] / weights[t])  # the first of several, as they stand in the table
        if (document := next(left[text], None)) is None:
            del left[text]
            continue
        for piece in tokens(document, tokenizer):
            ids += piece
            names += [text.name] * len(piece)
            had[text] += len(piece)
            whole = len(ids) // length * length
            for at in range(0, whole, length):
                yield _Window(ids[at : at + length], Counter(names[at : at + length]))
            del ids[:whole], names[:whole]


def _mixed(groups: Sequence[_Group], judged: Sequence[bool]) -> Iterator[tuple[str, _Window]]:
    """Group and window, as many as there are: windows for fitting in proportion to the shares, and those for judging too.

    The next one is of the group with the least (taken + 1/2) / share.
    """
    alive = list(groups)
    taken = {False: Counter[str](), True: Counter[str]()}
    for judge in judged:
        window = None
        while alive and window is None:
            group = min(alive, key=lambda g: (taken[judge][g.name] + 0.5) / g.share)
            if (window := next(group.left, None)) is None:
                alive.remove(group)
        if window is None:
            return
        taken[judge][group.name] += 1
        yield group.name, window


def _too_few(
    source: Sequence[Path] | str, found: Sequence[object], judged: Sequence[bool], length: int, wanted: int
) -> str:  # fmt: skip
    what = AUTO if isinstance(source, str) else ", ".join(str(file) for file in source[:3]) + (", …" if len(source) > 3 else "")
    judging = sum(judged[: len(found)])
    there = f"{(len(found) - judging) * length} tokens" + (f" and {judging * length} for judging" if judging else "")
    more = "name files of your own (--text FILE)" if isinstance(source, str) else "name more files (--text FILE)"
    return f"{what}: has {there}, in windows of {length}; {wanted} are wanted: {more}, or ask for fewer (--tokens)"
