"""What a run must have done when it was stopped, and when the same command was given again.

Everything here is the contract of the command line: exit codes, one line on stderr, `NAME.partial` until a file is
complete, the manifest last, private state that vanishes. How it is kept is not looked at.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.models import random_model
from helpers.words import byte_tokenizer

from faults._process import WIDTH, Forks, Outcome, Run, widths

MANIFEST, STATE, PARTIAL = "out/ernie-quant.json", "out/.ernie-quant", ".partial"
CONTAINER = ("--wint4-layers", "2", "--effort", "1")
# name -> command, source, options, bytes of a file at full width; each result is 6 to 10 files
COMMANDS: dict[str, tuple[Any, ...]] = {
    "convert": ("convert", "src", "--to", "paddle", "--max-shard-size", 4_000_000),
    "wint4": ("wint4", "src", "--mtp", "--max-shard-size", 1_000_000),
    "wint2": ("wint2", "src", *CONTAINER, "--max-shard-size", 1_500_000),
    "wint2 --tp 2": ("wint2", "src", *CONTAINER, "--tp", "2", "--max-shard-size", 1_500_000),
    "wint4 fastdeploy": ("wint4", "src", "--runtime", "fastdeploy", "--max-shard-size", 1_500_000),
    "wint4 calibrated": (
        "wint4",
        "spoken",
        "--mtp",
        "--calibration",
        "BOOK",
        "--calibration-tokens",
        "1024",
        "--fit",
        "--max-shard-size",
        1_000_000,
    ),
    "reshard": ("reshard", "container", "--tp", "2", "--max-shard-size", 1_500_000),
}
THREE = ("convert", "wint4", "wint2")
Tree = dict[str, bytes]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    tree: Tree
    seconds: float
    operations: tuple[str, ...]  # what changed files and folders, in order: `open out/config.json.partial`

    def before(self, at: int) -> str:
        """Where a run is before its at-th operation, in words."""
        what = self.operations[at - 1] if at <= len(self.operations) else "unknown"
        return f"before operation {at} of {len(self.operations)}, {what}"

    @property
    def disk_bytes(self) -> int:
        """In pages, as a tmpfs counts."""
        return sum(-(-len(data) // 4096) * 4096 for data in self.tree.values())


@dataclass
class Tally:
    """What happened to one command, for a line of the table."""

    command: str
    stopped: int = 0  # runs that a fault ended
    identical: int = 0  # results with the bytes of an uninterrupted run
    finished: int = 0  # weight files that were finished before a run that went on
    kept: int = 0  # those of them that it did not write again
    failures: list[str] = field(default_factory=list)
    left: int = 0  # folders of results that failed

    def add(self, problems: Iterable[str], scenario: str) -> bool:
        """True if there are none."""
        found = [f"{self.command}, {scenario}: {problem}" for problem in problems]
        self.failures += found
        return not found


LEFT = 3  # folders that stay to be looked at, of each command


def done(out: Path, tally: Tally, problems: list[str], end: list[str], scenario: str) -> None:
    """Count a result; what failed on the way or at the end stays to be looked at."""
    problems = problems + end
    tally.identical += not end
    tally.left += not tally.add(problems, f"{scenario} ({out})")
    if not problems or tally.left > LEFT:
        shutil.rmtree(out.parent)


class Bench:
    """The forking process, references, and folders to break runs in."""

    def __init__(self, folder: Path, *, fsync: bool = True, width: int = WIDTH) -> None:
        self.folder, self.fsync, self.width = folder.resolve(), fsync, width
        self.folder.mkdir(exist_ok=True)
        self.forks = Forks(self.folder, width)
        self._book = self.folder / "book.txt"
        self._references: dict[str, Reference] = {}
        self._trials = 0

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.forks.__exit__()

    def fresh(self) -> Path:
        """A path for a result. All are called `out`: the card has the name of its folder."""
        self._trials += 1
        parent = self.folder / f"trial-{self._trials}"
        parent.mkdir()
        return parent / "out"

    def reference(self, name: str) -> Reference:
        """Its own run, the first time; a second one measures how long it takes."""
        if name not in self._references:
            out, listed = self.folder / f"reference {name}" / "out", self.folder / f"operations {name}"
            out.parent.mkdir()
            outcome = self.run(name, out, list_to=str(listed))
            assert outcome.code == 0, f"{name}: {outcome}"
            again, begin = self.fresh(), time.monotonic()
            self.run(name, again)
            seconds = time.monotonic() - begin
            shutil.rmtree(again.parent)
            self._references[name] = Reference(tree(out.parent), seconds, tuple(listed.read_text().splitlines()))
        return self._references[name]

    def finished(self, name: str) -> Path:
        """The result that the reference has the bytes of, to be copied."""
        self.reference(name)
        return self.folder / f"reference {name}" / "out"

    def _prepare(self, name: str) -> None:
        container = self.folder / COMMANDS[name][1]
        if container.name == "spoken" and not container.exists():
            byte_tokenizer(random_model(container, "pt", "moe_mtp", **widths(self.width) | {"vocab_size": 256}))
            self._book.write_text("".join(f"{n} and {n * n}, " for n in range(400)))
        if not container.exists():
            outcome = self.forks.run("wint2", self.folder / "src", container, *CONTAINER, watch=str(container))
            assert outcome.code == 0, outcome

    def start(self, name: str, out: Path, *options: object, source: Path | None = None, **faults: Any) -> Run:
        self._prepare(name)
        command, folder, *rest, shard_bytes = COMMANDS[name]
        rest = [str(self._book) if option == "BOOK" else option for option in rest]
        rest.append(shard_bytes * self.width**2 // WIDTH**2)
        faults = {"watch": str(out.parent), "fsync": self.fsync, **faults}
        return self.forks.start(command, source or self.folder / folder, out, *rest, *options, **faults)

    def run(self, name: str, out: Path, *options: object, **faults: Any) -> Outcome:
        return self.start(name, out, *options, **faults).wait()

    def verify(self, out: Path) -> Outcome:
        return self.forks.run("verify", out, watch=str(out.parent))


def tree(parent: Path) -> Tree:
    """Every file and folder below `parent`, hidden ones too."""
    found = sorted(parent.rglob("*"))
    return {p.relative_to(parent).as_posix() + "/" * p.is_dir(): b"" if p.is_dir() else p.read_bytes() for p in found}


def stamps(parent: Path, pattern: str = "*") -> dict[str, tuple[int, int]]:
    """Which file was written when: one that is written again has another inode or time."""
    files = [p for p in parent.rglob(pattern) if p.is_file()]
    return {p.relative_to(parent).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def visible(found: Mapping[str, bytes]) -> Tree:
    """Files of the result that have their final names."""
    return {
        name: data
        for name, data in found.items()
        if name.startswith("out/") and not name.startswith(f"{STATE}/") and not name.endswith((PARTIAL, "/"))
    }


def differences(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> list[str]:
    """What is not as it should be, in words."""
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "left over": found.keys() - wanted.keys(),
        "not with the right bytes": {name for name in found.keys() & wanted.keys() if found[name] != wanted[name]},
    }
    return [f"{len(names)} {what}: {', '.join(sorted(names)[:3])}" for what, names in wrong.items() if names]


# --- what must hold --------------------------------------------------------------------------------------------------


def stopped_well(bench: Bench, name: str, out: Path) -> list[str]:
    """After a run that was stopped: no wrong file has a final name, and the folder does not claim to be finished."""
    found, wanted = tree(out.parent), bench.reference(name).tree
    files = visible(found)
    problems = [f"{f} has its final name and not its bytes" for f, data in files.items() if wanted.get(f) != data]
    if MANIFEST in found:
        return problems + [f"{f} is missing, and the manifest is there" for f in visible(wanted).keys() - files.keys()]
    outcome = bench.verify(out)
    if outcome.code != 1 or (
        any(name.startswith("out/") and name != "out/" for name in found) and "not finished" not in outcome.err
    ):
        problems.append(f"verify of the unfinished folder: {outcome}")
    return problems


def ends_well(bench: Bench, name: str, out: Path, workers: int = 1, **faults: Any) -> list[str]:
    """The same command goes on to the bytes of an uninterrupted run; given once more, it says so and changes nothing."""
    outcome = bench.run(name, out, "--workers", workers, **faults)
    if outcome.code or outcome.err:
        return [f"the same command: {outcome}"]
    return is_result(bench, name, out)


def is_result(bench: Bench, name: str, out: Path) -> list[str]:
    """These bytes and nothing else, and whoever asks for them again is told so."""
    if found := differences(tree(out.parent), bench.reference(name).tree):
        return found
    before = stamps(out.parent)
    outcome = bench.run(name, out)
    problems = [f"once more: {outcome}"] if outcome.code or outcome.err or "complete" not in outcome.out else []
    return problems + (["a complete folder is changed"] if stamps(out.parent) != before else [])


def says_retry(outcome: Outcome, out: Path, codes: tuple[int, ...] = (75,)) -> list[str]:
    """One line that names the folder or a file in it, and what to do."""
    if outcome.code not in codes or not outcome.one_line or outcome.out:
        return [str(outcome)]
    return [] if str(out) in outcome.err and "same command" in outcome.err else [f"says neither where nor what to do: {outcome}"]


@dataclass
class Kept:
    """Counts the weight files that a run which goes on does not write again. The last one may not be recorded yet."""

    tally: Tally
    out: Path
    before: dict[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.before = stamps(self.out, "*.safetensors")

    def check(self) -> list[str]:
        after = stamps(self.out, "*.safetensors")
        # what is made only to be shared among ranks vanishes at the end
        before = {name: x for name, x in self.before.items() if name in after or not f"out/{name}".startswith(STATE)}
        again = [name for name, stamp in before.items() if after.get(name) != stamp]
        self.tally.finished += len(before)
        self.tally.kept += len(before) - len(again)
        return [f"{len(again)} of {len(before)} finished files written again: {again}"] if len(again) > 1 else []


def show(title: str, tallies: Iterable[Tally]) -> int:
    """Print the table and the failures; the exit code."""
    tallies = list(tallies)
    head = ("command", "stopped", "identical", "files kept", "failures")
    rows = [
        head,
        *((t.command, str(t.stopped), str(t.identical), f"{t.kept} of {t.finished}", str(len(t.failures))) for t in tallies),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    print(f"\n{title}")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for failure in (f for t in tallies for f in t.failures):
        print(f"FAILED {failure}")
    return int(any(t.failures for t in tallies))
