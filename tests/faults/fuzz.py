"""Feed the readers, inspect, the plan and the run with files that a stranger changed; report everything but an answer.

python tests/faults/fuzz.py --mutations 100000 --seed 0
python tests/faults/fuzz.py --seed 0 --only 4711       # one mutation again, with everything that is known of it

An answer is success, or an ErnieQuantError of a few short lines. Another exception, a warning, more than `SECONDS`,
much memory, an open outside of the folder, a result of a refused source: a finding. Mutation N depends on the seed and N alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ernie_quant.sources import open_source

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ernie_quant.cli import _show

from ernie_quant import inspection
from ernie_quant.check.verify import verify
from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import MAX_LINE, MAX_LINES, ErnieQuantError, line_of
from ernie_quant.planning import recipe
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.steps import Plan
from ernie_quant.planning.summary import summary
from ernie_quant.run.whole import run_plan
from faults._checkpoints import KINDS, Sandbox, Variant, wint4
from faults._watch import watching

SECONDS = 5.0
MEMORY_MB = 700
RUN_BYTES, RUN_EVERY = 4 << 20, 10  # which plans are run too: small ones, one in so many


@dataclass
class Row:
    """What became of one kind of file."""

    mutations: int = 0
    accepted: int = 0
    refused: int = 0
    findings: int = 0
    slowest_s: float = 0.0


@dataclass
class Summary:
    """What became of all."""

    rows: dict[str, Row] = field(default_factory=lambda: {kind: Row() for kind in KINDS})
    findings: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0
    growth_mb: float = 0.0  # of peak memory, by the worst single mutation
    peak_mb: float = 0.0

    @property
    def all(self) -> Row:
        """The sum."""
        rows = self.rows.values()
        counts = (sum(getattr(r, name) for r in rows) for name in ("mutations", "accepted", "refused", "findings"))
        return Row(*counts, max(r.slowest_s for r in rows))

    def table(self) -> str:
        """For people."""
        head = f"{'kind':10} {'mutations':>10} {'accepted':>10} {'refused':>10} {'findings':>10} {'slowest, s':>10}"
        rows = [
            f"{kind:10} {r.mutations:10} {r.accepted:10} {r.refused:10} {r.findings:10} {r.slowest_s:10.3f}"
            for kind, r in [*self.rows.items(), ("all", self.all)]
        ]
        memory = f"memory {self.peak_mb:.0f} MB, at most {self.growth_mb:.0f} MB more by one mutation"
        return "\n".join([head, *rows, f"{self.runs} were run too; {self.seconds:.0f} s; {memory}"])


# --- one mutation ----------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A mutation took too long."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises Hang."""

    def stop(*_: object) -> NoReturn:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def look_and_plan(variant: Variant, rng: random.Random, **more: Any) -> list[Plan]:
    """What `inspect`, `convert --dry-run` and `wint4 --dry-run` do (with `more` options). Raises what they raise.

    GGUF files are opened, no more: they hold too little to be planned with.
    """
    if variant.kind == "gguf":
        checked(open_source(variant.folder))
        return []
    found = inspection.inspect(variant.folder)
    shown = _show.inspection(found) + json.dumps(vars(found), ensure_ascii=False)
    shown.encode()
    assert all(line.isprintable() for line in (*found.anomalies, *found.notes)), "inspect shows what does not print"
    checkpoint = open_source(variant.folder)
    if variant.dequantize:
        return [make_plan(checkpoint, runtime=rng.choice(("vllm", "fastdeploy")), dequantize=True)]
    wanted = [("vllm", recipe.KEEP_ALL), ("fastdeploy", recipe.KEEP_ALL), ("vllm", wint4())]
    plans = []
    for runtime, rules in wanted if rng.random() < 0.2 else [rng.choice(wanted)]:
        spelling = rng.choice(("flat", "transformers"))
        plan = make_plan(checkpoint, runtime=runtime, recipe=rules, vl_config=spelling, **more)
        summary(plan)
        json.dumps(dict(plan.config), allow_nan=False).encode()
        assert plan.disk_bytes >= plan.nbytes >= 0
        plans.append(plan)
    return plans


def checked(checkpoint: Checkpoint) -> None:
    """Every tensor lies in its file, and what is said of them prints."""
    for ref in checkpoint.refs.values():
        extent = ref.extents[0]
        assert 0 < extent.start <= extent.start + extent.nbytes <= ref.file.stat().st_size, f"{ref.name} is not in its file"
        assert extent.nbytes == ref.spec.nbytes
    assert all(line_of(line) == line for line in (*checkpoint.anomalies, *checkpoint.notes)), "a line that does not print"


def check_words(error: ErnieQuantError) -> None:
    """An error is a few lines that can be printed."""
    text = str(error)
    text.encode()
    lines = text.split("\n")
    assert lines[0], "an error without words"
    assert len(lines) <= MAX_LINES + 2, f"an error of {len(lines)} lines"
    assert all(len(line) <= MAX_LINE + 2 and line.isprintable() for line in lines), f"an error line of {max(map(len, lines))}"
    assert "Traceback" not in text


def attempt(sandbox: Sandbox, variant: Variant, rng: random.Random, total: Summary) -> tuple[str, list[str]]:
    """What became of it, "accepted" or "refused", and everything that is neither."""
    out, findings, plans, outcome = sandbox.results / "out", [], [], "refused"
    try:
        with watching(variant.folder, sandbox.results) as escapes, time_limit():
            try:
                plans = look_and_plan(variant, rng, **variant.options(rng))
                outcome = "accepted"
            except ErnieQuantError as error:
                check_words(error)
    except (Exception, Hang) as error:
        findings.append(told(error))
    findings += [f"escape: {e}" for e in escapes]
    often = 2 if variant.kind == "beside" else RUN_EVERY  # what lies there is copied at the end
    if plans and not findings and rng.randrange(often) == 0 and plans[-1].nbytes < RUN_BYTES:
        total.runs += 1
        try:
            with watching(variant.folder, sandbox.results, code=False) as escapes, time_limit():
                try:
                    run_plan(plans[-1], out, workers=1)
                except ErnieQuantError as error:
                    check_words(error)
                    assert not (out / "ernie-quant.json").exists(), "a refused source has a finished result"
                else:
                    check_result(sandbox, out)
        except (Exception, Hang) as error:
            findings.append(told(error))
        findings += [f"escape while running: {e}" for e in escapes]
        shutil.rmtree(out, ignore_errors=True)
    if out.exists():
        findings.append("a dry run left something")
        shutil.rmtree(out)
    return outcome, findings


def check_result(sandbox: Sandbox, out: Path) -> None:
    """Plain files, all in the manifest and as it says, none of them from outside."""
    odd = [path.name for path in out.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    assert not odd, f"the result has what is no file: {odd}"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    listed = json.loads((out / "ernie-quant.json").read_text())["files"].keys() | {"ernie-quant.json", "SHA256SUMS"}
    assert files == listed, f"manifest and folder differ: {sorted(files ^ listed)}"
    same = [p for p in out.rglob("*") if p.is_file() and p.stat().st_size == len(sandbox.outside)]
    assert not any(path.read_bytes() == sandbox.outside for path in same), "the result has a file from outside"
    verify(out, sample=1)


def told(error: BaseException) -> str:
    """What was raised, and where."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ernie_quant" in f.filename]
    where = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
    return f"{type(error).__name__}: {str(error)[:300]!r} at {where}"


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def one(sandbox: Sandbox, seed: int, number: int, total: Summary, show: bool = False) -> None:
    """Mutation `number` of `seed`."""
    rng = random.Random(f"{seed}-{number}")
    variant = rng.choice(sandbox.variants[rng.choice(KINDS)])
    data = variant.change(rng)
    row, memory = total.rows[variant.kind], peak_mb()
    with variant.changed(data):
        start = time.monotonic()
        outcome, findings = attempt(sandbox, variant, rng, total)
    row.slowest_s = max(row.slowest_s, time.monotonic() - start)
    total.peak_mb = peak_mb()
    total.growth_mb = max(total.growth_mb, total.peak_mb - memory)
    if total.peak_mb - memory > MEMORY_MB:
        findings.append(f"memory: {total.peak_mb - memory:.0f} MB more")
    row.mutations += 1
    row.accepted += outcome == "accepted" and not findings
    row.refused += outcome == "refused" and not findings
    row.findings += bool(findings)
    lines = list(dict.fromkeys(findings))[:3]
    total.findings += [f"--seed {seed} --only {number}: {variant.kind} of {variant.folder.name}: {line}" for line in lines]
    if show:
        kept = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{number}-{variant.file or variant.kind}"
        kept.write_bytes(data)
        print(f"{outcome}; the changed file is {kept}")


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """In memory, where there is such a place: nothing waits for a disk then."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=where) as root, warnings.catch_warnings():
        warnings.simplefilter("error")
        built = Sandbox(Path(root).resolve())
        for variants in built.variants.values():
            for variant in variants:  # everything is imported and compiled now, and good before it is changed
                for draw in range(8):
                    plans = look_and_plan(variant, random.Random(draw))
                if plans:
                    run_plan(plans[-1], built.results / "out", workers=1)
                    shutil.rmtree(built.results / "out")
        yield built


def fuzz(mutations: int, seed: int, first: int = 0, within: Sandbox | None = None) -> Summary:
    """`mutations` changed files, from number `first` on."""
    if within is None:
        with sandbox() as built:
            return fuzz(mutations, seed, first, built)
    total, start = Summary(), time.monotonic()
    for number in range(first, first + mutations):
        one(within, seed, number, total)
    total.seconds = time.monotonic() - start
    return total


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", type=int, help="this one mutation, and keep the changed file")
    arguments = parser.parse_args()
    if arguments.only is None:
        total = fuzz(arguments.mutations, arguments.seed, arguments.first)
    else:
        total = Summary()
        with sandbox() as built:
            one(built, arguments.seed, arguments.only, total, show=True)
    print("\n".join([*total.findings[:200], total.table()]))
    return 1 if total.findings else 0


if __name__ == "__main__":
    sys.exit(main())
