"""How far a model is from another on a text: perplexity of both, KL divergence, the same best token.

Both are passed a layer at a time in float32, so that nothing differs but the weights, and what a form of them says of
activations and the KV cache (`integers`). Means have two standard errors:
over tokens, which takes them for independent, and over windows, which does not (tokens of a window are correlated).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_quant.calibration.forward import start, through
from ernie_quant.calibration.judge import Judged, judge
from ernie_quant.calibration.opened import Opened, Readable, readable
from ernie_quant.calibration.tokenizer import Tokenizer, has_tokenizer, tokenizer_of
from ernie_quant.calibration.windows import LENGTH, beginning

import ernie_quant
from ernie_quant.errors import PlanError, TextError
from ernie_quant.jsonio import read_object
from ernie_quant.paths import MANIFEST
from ernie_quant.reporting.evaluation import EVALUATED
from ernie_quant.threads import Progress

if TYPE_CHECKING:
    import torch

PREDICTED = LENGTH - 1  # tokens of a window that have one before them
TAIL = 0.99
LARGEST = 700.0  # nats whose exp is still a float


@dataclass(frozen=True)
class Estimate:
    """A number of a text, and standard errors over tokens and over windows; None where there are too few, or is no such."""

    value: float
    token_error: float | None
    window_error: float | None


@dataclass(frozen=True)
class Row:
    """One text, or all of them together. What compares is None without a source."""

    name: str
    sha256: str
    windows: int
    tokens: int
    perplexity: Estimate
    source_perplexity: Estimate | None = None
    kl: Estimate | None = None  # mean of KL(source || result), nats per token
    kl_99: Estimate | None = None  # its 99th percentile
    same_top: Estimate | None = None  # share of tokens for which both would say the same


@dataclass(frozen=True)
class Evaluation:
    """What a result is worth on texts."""

    result: Mapping[str, str]
    source: Mapping[str, str] | None
    rows: tuple[Row, ...]
    together: Row
    bytes: int  # of the result's tensors


@dataclass(frozen=True)
class Pair:
    """A result and its source, if there is one; nothing but headers has been read."""

    result: Readable
    source: Readable | None

    @property
    def sides(self) -> list[Readable]:
        """The reference first."""
        return [side for side in (self.source, self.result) if side is not None]

    @property
    def nbytes(self) -> int:
        """What the progress of an evaluation adds up to."""
        return sum(side.nbytes for side in self.sides)


def pair(result: Path | str, source: Path | str | None, *, links: bool = False, rounds: bool = True) -> Pair:
    """`rounds`: are activations and KV cache rounded where a program does so that loads them?

    Raises PlanError (another model, a checkpoint with problems), CheckpointError, ConfigError, HubError or RetryError.
    """
    mine, base = readable(result, rounds=rounds), None if source is None else readable(source, links=links, rounds=rounds)
    if base is not None and (one := _shape(mine)) != (two := _shape(base)):
        raise PlanError(f"{result} has {one}, {source} has {two}: not the same model", [])
    return Pair(mine, base)


def _shape(side: Readable) -> str:
    shape = side.geometry
    experts = f", {shape.routing.experts} experts" if shape.routing else ""
    return f"{shape.layers} layers {shape.hidden_size} wide{experts}, {shape.vocab_size} tokens"


def evaluate(two: Pair, files: Sequence[Path], tokens: int, progress: Progress = lambda _: None) -> Evaluation:
    """The first `tokens` of every text, in windows of 512 that predict 511 each. Raises TextError, CheckpointError, PlanError."""
    count = windows_of(tokens)
    tokenizer = _tokenizer(two)
    texts = [beginning(tokenizer, file, count) for file in files]
    judged = _judged(two, [ids for _, ids in texts], progress)
    if not all(bool(nll.isfinite().all()) for nll in (judged.nll, judged.nll_other) if nll is not None):
        raise PlanError(f"{two.result.checkpoint.title}: NaN or infinity comes out of it or its source; verify says more", [])
    parts = [slice(number * count * PREDICTED, (number + 1) * count * PREDICTED) for number in range(len(texts))]
    rows = [_row(text.name, text.sha256, judged, part) for (text, _), part in zip(texts, parts, strict=True)]
    source = None if two.source is None else _facts(two.source)
    return Evaluation(
        _facts(two.result), source, tuple(rows), _row("together", "", judged, slice(None)), two.result.checkpoint.nbytes
    )


def windows_of(tokens: int) -> int:
    """Windows that predict so many. Raises TextError."""
    if tokens % PREDICTED:
        below = tokens // PREDICTED * PREDICTED
        near = f"{below} or {below + PREDICTED}" if below else str(PREDICTED)
        raise TextError(f"--tokens {tokens}: is no multiple of {PREDICTED}, which a window of {LENGTH} predicts; ask for {near}")
    return tokens // PREDICTED


def _tokenizer(two: Pair) -> Tokenizer:
    """That of the source; of the result where the source has none. Raises TextError."""
    folders = [side.checkpoint.folder for side in two.sides]
    return tokenizer_of(next((folder for folder in folders if has_tokenizer(folder)), folders[0]))


def _judged(two: Pair, texts: Sequence[torch.Tensor], progress: Progress) -> Judged:
    """Of all texts, one after the other; the source is the reference."""
    import torch

    ids = torch.cat(list(texts))
    with ExitStack() as stack:
        opened = [(stack.enter_context(side.read()), side) for side in two.sides]
        streams = [_stage(start(one.model, ids), one, side, 0, progress) for one, side in opened]
        for layer in range(two.result.geometry.layers):
            for number, (one, side) in enumerate(opened):
                streams[number] = _stage(through(one.model, layer, streams[number]), one, side, layer + 1, progress)
        seen = [(one.model, stream[:, :-1].flatten(0, 1)) for (one, _), stream in zip(opened, streams, strict=True)]
        found = judge(*seen[0], ids[:, 1:].flatten(), seen[1] if len(seen) > 1 else None)
        for side in two.sides:
            progress(side.stage_nbytes(-1))
    return found


def _stage(found: torch.Tensor, one: Opened, side: Readable, stage: int, progress: Progress) -> torch.Tensor:
    """A stage has been read."""
    one.done(stage)
    progress(side.stage_nbytes(stage))
    return found


def _row(name: str, sha256: str, judged: Judged, part: slice) -> Row:
    nll = judged.nll[part]
    windows = len(nll) // PREDICTED
    if judged.nll_other is None or judged.kl is None or judged.same is None:
        return Row(name, sha256, windows, len(nll), _perplexity(nll))
    kl = judged.kl[part]
    return Row(
        name, sha256, windows, len(nll), _perplexity(judged.nll_other[part]), _perplexity(nll), _mean(kl), _tail(kl),
        _mean(judged.same[part]),
    )  # fmt: skip


def _mean(values: torch.Tensor) -> Estimate:
    windows = values.view(-1, PREDICTED).mean(1)
    over_windows = float(windows.std()) / math.sqrt(len(windows)) if len(windows) > 1 else None
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)), over_windows)


def _perplexity(nll: torch.Tensor) -> Estimate:
    """exp of the mean; to first order, its error is that of the mean times itself."""
    mean = _mean(nll)
    value = math.exp(min(mean.value, LARGEST))
    return Estimate(value, *(None if error is None else value * error for error in (mean.token_error, mean.window_error)))


def _tail(values: torch.Tensor) -> Estimate:
    """99th percentile; its error is half the distance of the values one standard error of the rank away."""
    import torch

    ordered, _ = torch.sort(values)
    count = len(ordered)
    spread = math.sqrt(count * TAIL * (1 - TAIL))
    places = [min(max(round(TAIL * (count - 1) + shift), 0), count - 1) for shift in (-spread, 0.0, spread)]
    low, value, high = (float(ordered[place]) for place in places)
    return Estimate(value, (high - low) / 2, None)


def _facts(side: Readable) -> dict[str, str]:
    """What names a checkpoint without saying where it lies, and the fingerprint of one that this tool has made."""
    place = side.checkpoint.folder / MANIFEST
    made = read_object(place).get("fingerprint") if place.is_file() else None
    return {**side.identity, "fingerprint": made if isinstance(made, str) else "", "integers": side.integers}


def as_json(found: Evaluation) -> dict[str, Any]:
    """For --json, --save and the card; reporting/evaluation.py makes a table of it."""
    return {"status": EVALUATED, "version": ernie_quant.__version__, "window": LENGTH, **asdict(found)}
