"""Fill the disk under a run, make it larger, and see that the same command ends with the bytes of an unbroken run.

python tests/faults/full_disk.py               # 20 sizes; a tmpfs each where mounting is allowed, else injected errors
python tests/faults/full_disk.py --inject      # injected errors
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults._bench import COMMANDS, Bench, Kept, Tally, done, ends_well, says_retry, show, stopped_well, tree
from faults._process import PLENTY

PAGE = 4096


# --- disks -----------------------------------------------------------------------------------------------------------


def mount(folder: Path, *options: str) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and subprocess.run(words, capture_output=True, check=False).returncode == 0


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        mounted = sys.platform == "linux" and mount(Path(folder), "size=64k")
        if mounted:
            subprocess.run(["umount", folder], check=True)
    return mounted


@contextmanager
def disk(folder: Path, size: int, *, inject: bool) -> Iterator[dict[str, Any]]:
    """A disk of `size` bytes at `folder`; the faults that stand for it if it is not mounted."""
    if inject:
        yield {"budget": size}
        return
    assert mount(folder, f"size={size}")
    try:
        yield {}
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- scenarios -------------------------------------------------------------------------------------------------------


def fill(bench: Bench, name: str, share: float, tally: Tally, *, inject: bool, number: str = "ENOSPC") -> None:
    """Room for a share of the result, though the system promised enough: another program fills the disk meanwhile."""
    reference, out = bench.reference(name), bench.fresh()
    needed = reference.disk_bytes * (2 if "--tp" in name else 1)  # two copies while it runs
    size = max(1, round(share * needed / PAGE)) * PAGE
    with disk(out.parent, size, inject=inject) as faults:
        if inject:
            faults["number"] = number
        outcome = bench.run(name, out, free=PLENTY, **faults)
        problems = says_retry(outcome, out)
        tally.stopped += outcome.code != 0
        problems += stopped_well(bench, name, out)
        if not inject:
            assert mount(out.parent, "remount", f"size={3 * needed}")
        kept = Kept(tally, out)
        end = ends_well(bench, name, out)
        problems += kept.check()
    done(out, tally, problems, end, f"{number} at {share:.0%}, {size} bytes")


def refuse(bench: Bench, name: str, tally: Tally, *, inject: bool) -> None:
    """Too small from the beginning: nothing is written."""
    reference, out = bench.reference(name), bench.fresh()
    size = reference.disk_bytes // 2 // PAGE * PAGE
    with disk(out.parent, size, inject=inject) as faults:
        outcome = bench.run(name, out, **({"free": size} | faults if inject else {}))
        problems = [] if outcome.code == 75 and outcome.one_line and str(out) in outcome.err else [str(outcome)]
        problems += [f"{path} is written" for path in tree(out.parent)]
    tally.stopped += 1
    done(out, tally, problems, [], "a disk that is too small from the beginning")


def write_protect(bench: Bench, name: str, tally: Tally, *, inject: bool, begun: bool) -> None:
    """Nothing can be written: that is no matter of time."""
    reference, out = bench.reference(name), bench.fresh()
    with disk(out.parent, 4 * reference.disk_bytes, inject=inject):
        if begun:
            bench.run(name, out, at=40, action="kill")
        before = tree(out.parent)
        if not inject:
            assert mount(out.parent, "remount", "ro")
        outcome = bench.run(name, out, readonly=inject)
        problems = [] if outcome.code == 1 and outcome.one_line and str(out) in outcome.err else [str(outcome)]
        problems += ["the folder is changed"] if tree(out.parent) != before else []
        if not inject:
            assert mount(out.parent, "remount", "rw")
        end = ends_well(bench, name, out)
    tally.stopped += 1
    done(out, tally, problems, end, f"a disk that cannot be written{', after a beginning' * begun}")


# --- the long version ------------------------------------------------------------------------------------------------


def all_sizes(bench: Bench, names: list[str], sizes: int, *, inject: bool, number: str = "ENOSPC") -> list[Tally]:
    """So many sizes from 2% to 99% of what each command needs."""
    tallies = [Tally(name) for name in names]
    for tally in tallies:
        for i in range(sizes):
            fill(bench, tally.command, 0.02 + 0.97 * i / max(1, sizes - 1), tally, inject=inject, number=number)
    return tallies


def all_refusals(bench: Bench, names: list[str], *, inject: bool) -> list[Tally]:
    tallies = [Tally(name) for name in names]
    for tally in tallies:
        refuse(bench, tally.command, tally, inject=inject)
        for begun in (False, True):
            write_protect(bench, tally.command, tally, inject=inject, begun=begun)
    return tallies


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=20, metavar="N", help="sizes between 2%% and 99%% of the need [20]")
    parser.add_argument("--inject", action="store_true", help="do not mount anything")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--folder", type=Path, help="where to work [a temporary folder]")
    return parser.parse_args()


def become_root_of_a_namespace() -> None:
    """Where that is allowed, mounting is allowed there."""
    words = ["unshare", "--map-root-user", "--mount", sys.executable]
    if shutil.which(words[0]) and subprocess.run([*words, "-c", ""], capture_output=True, check=False).returncode == 0:
        os.execvp(words[0], [*words, *sys.argv])


def main() -> int:
    """Every size, quota and refusal, a table each; 1 if anything failed."""
    asked = arguments()
    if not asked.inject and os.geteuid():
        become_root_of_a_namespace()
    inject, names, failed = asked.inject or not can_mount(), asked.commands, 0
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="ernie-quant-faults-"))
    with Bench(folder) as bench:
        for title, work in (
            (f"full disk, {'injected' if inject else 'tmpfs'}", lambda: all_sizes(bench, names, asked.sizes, inject=inject)),
            ("full quota, injected", lambda: all_sizes(bench, names, 5, inject=True, number="EDQUOT")),
            ("too small from the beginning, or not writable", lambda: all_refusals(bench, names, inject=inject)),
        ):
            begin = time.monotonic()
            tallies = work()
            failed |= show(f"{title}, {time.monotonic() - begin:.0f} s", tallies)
    if not failed and not asked.folder:
        shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
