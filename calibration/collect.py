"""One pass of a model over a text, and what went into its projections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_quant.calibration.forward import start, through
from ernie_quant.calibration.opened import Readable, readable
from ernie_quant.calibration.statistics import Sums, begun, check_place, specs_of
from ernie_quant.calibration.tokenizer import tokenizer_of
from ernie_quant.calibration.windows import windows

import ernie_quant
from ernie_quant.reporting.rows import some
from ernie_quant.threads import Progress

FEW = 64  # tokens of an expert below which its statistics say little


@dataclass(frozen=True)
class Collected:
    """What was written, and which experts it says little about: (layer, expert, tokens)."""

    out: str
    nbytes: int
    sha256: str
    text: dict[str, Any]
    layers: int
    experts: int  # of all layers together
    unseen: tuple[tuple[int, int], ...]
    few: tuple[tuple[int, int, int], ...]
    all_experts: bool


def prepare(source: Path | str, out: Path, *, links: bool = False) -> Readable:
    """The checkpoint, of which nothing is read but headers. Raises as `readable` does, and OutputError."""
    check_place(out)
    return readable(source, links=links)


def work(source: Readable) -> int:
    """Bytes that a pass reads: all stages but the head."""
    return source.nbytes - source.stage_nbytes(-1)


def collect(
    source: Readable, out: Path, texts: Sequence[Path] | str, tokens: int, *, seed: int, matrices: bool = False,
    all_experts: bool = False, progress: Progress = lambda _: None,
) -> Collected:  # fmt: skip
    """Statistics of `tokens` tokens of `texts` (files, or `windows.AUTO`) in the file `out`.

    `matrices`: second moments between channels too, of inputs that many outputs share. `all_experts`: every expert's
    statistics are of all tokens, routed to it or not. Raises TextError, CheckpointError, OutputError or RetryError.
    """
    found = windows(tokenizer_of(source.checkpoint.folder), texts, tokens, seed=seed, judge=False)
    routed: dict[int, list[int]] = {}
    with source.read(range(source.geometry.layers + 1)) as opened:
        model = opened.model
        hidden = start(model, found.ids)
        with begun(out, specs_of(model, matrices), _metadata(source, found.description, all_experts)) as file:
            for stage in range(source.geometry.layers + 1):
                if stage:
                    sums = Sums(model, stage - 1, matrices)
                    hidden = through(model, stage - 1, hidden, sums, all_experts=all_experts)
                    for name, value in sums.tensors():
                        file.write(name, value)
                    if stage - 1 in source.geometry.sparse:
                        routed[stage - 1] = sums.routed.tolist()
                opened.done(stage)
                progress(source.stage_nbytes(stage))
            opened.files.check()
            sha256 = file.close()
    each = [(layer, expert, count) for layer, counts in routed.items() for expert, count in enumerate(counts)]
    return Collected(
        str(out), file.nbytes, sha256, found.description, source.geometry.layers, len(each),
        tuple((layer, expert) for layer, expert, count in each if not count),
        tuple(one for one in each if 0 < one[2] < FEW), all_experts,
    )  # fmt: skip


def _metadata(source: Readable, text: dict[str, Any], all_experts: bool) -> dict[str, str]:
    return {
        "version": ernie_quant.__version__, "source": json.dumps(source.identity, sort_keys=True),
        "text": json.dumps(text, sort_keys=True), "all_experts": str(all_experts).lower(),
    }  # fmt: skip


def as_json(found: Collected) -> dict[str, Any]:
    """For --json."""
    return {"status": "collected", **asdict(found)}


def as_text(found: Collected) -> str:
    """For people."""
    text = found.text
    of = ", ".join(f"{name.removesuffix('.jsonl')} {count}" for name, count in text["tokens_of"].items())
    lines = [
        f"{found.out}: {found.nbytes / 1e9:.3f} GB, {text['tokens']} tokens in {text['tokens'] // text['window']} windows"
        f" through {found.layers} layers",
        f"tokens: {of}",
    ]
    lines += [f"note: {line}" for line in notes(found)]
    return "\n".join(lines)


def notes(found: Collected) -> list[str]:
    """Texts that had no turn, and experts that the text says little about."""
    seen = "; --all-experts gave them those of all tokens" if found.all_experts else ""
    lines = []
    if absent := [name for name, count in found.text["tokens_of"].items() if not count]:
        lines.append(f"no window has a word of {some(absent)}; ask for more (--tokens)")
    if found.unseen:
        names = some([f"layer {layer} expert {expert}" for layer, expert in found.unseen])
        lines.append(f"{len(found.unseen)} of {found.experts} experts were asked by no token{seen}: {names}")
    if found.few:
        names = some([f"layer {layer} expert {expert} ({count})" for layer, expert, count in found.few])
        lines.append(f"{len(found.few)} of {found.experts} experts were asked by fewer than {FEW} tokens{seen}: {names}")
    return lines
