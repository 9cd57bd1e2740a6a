"""Break runs in every way but a full disk, and see that the same command ends with the bytes of an unbroken run.

python tests/faults/kills.py                   # all of it
python tests/faults/kills.py --kills 200       # SIGKILL at random moments
python tests/faults/kills.py --every 1         # SIGKILL before each single file operation, with --restart too
python tests/faults/kills.py --ray 20          # SIGKILL of runs on a Ray cluster of two nodes, and of its workers
python tests/faults/kills.py --signals 40 --two 40 --clock 20 --changes --commands wint4 wint2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count, cycle
from pathlib import Path

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.clusters import at_work, nodes

from faults._bench import (
    COMMANDS,
    MANIFEST,
    PARTIAL,
    Bench,
    Kept,
    Tally,
    differences,
    done,
    ends_well,
    is_result,
    show,
    stamps,
    stopped_well,
    tree,
    visible,
)
from faults._process import Outcome

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
Between = Callable[[Path], None]


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def kill_at_random(bench: Bench, name: str, rng: random.Random, tally: Tally, between: Between | None = None) -> None:
    """One result: a run that is killed at a random moment, perhaps two runs that go on and are killed too, the last one.

    `between` does something to the folder between two runs.
    """
    out, seconds, scenario, backwards = bench.fresh(), bench.reference(name).seconds, "killed", between is not None
    problems: list[str] = []
    for attempt in range(rng.choice((1, 1, 2, 3))):  # a half, a quarter, a quarter
        delay = rng.uniform(0, seconds * (1.2, 0.7, 0.4)[attempt])
        kept = Kept(tally, out)
        run = bench.start(name, out, "--workers", rng.choice((1, 2)), backwards=backwards)
        time.sleep(delay)
        run.send(signal.SIGKILL)
        outcome = run.wait()
        scenario += f" after {delay:.4f} s" if outcome.code == -signal.SIGKILL else f" after its end ({outcome.code})"
        tally.stopped += outcome.code == -signal.SIGKILL
        if outcome.code not in (0, -signal.SIGKILL):
            problems.append(str(outcome))
        problems += kept.check() + stopped_well(bench, name, out)
        if between is not None:
            between(out)
    kept = Kept(tally, out)
    end = ends_well(bench, name, out, rng.choice((1, 2)), backwards=backwards)
    done(out, tally, problems + kept.check(), end, scenario)


def another_year(out: Path) -> None:
    """Half of the files are from 1970, half from 2100, private ones too."""
    for path, year in zip(sorted(out.parent.rglob("*")), cycle((0, 130 * 31_557_600))):
        os.utime(path, (year, year))


def kill_before(bench: Bench, name: str, at: int, tally: Tally) -> bool:
    """Killed right before its at-th file operation; False if there are not so many."""
    out = bench.fresh()
    if not killed(bench.run(name, out, at=at, action="kill"), out, tally):
        return False
    problems = stopped_well(bench, name, out)
    kept = Kept(tally, out)
    end = ends_well(bench, name, out)
    done(out, tally, problems + kept.check(), end, f"killed {bench.reference(name).before(at)}")
    return True


def killed(outcome: Outcome, out: Path, tally: Tally) -> bool:
    """Or has it come to its end before?"""
    if outcome.code == -signal.SIGKILL:
        tally.stopped += 1
        return True
    tally.add([] if outcome.code == 0 else [str(outcome)], "a run that nobody stopped")
    shutil.rmtree(out.parent)
    return False


def kill_restart_before(bench: Bench, old: str, new: str, at: int, tally: Tally, *, begun: bool = False) -> bool:
    """`--restart` over another plan's result, or the beginning of one, killed before its at-th file operation."""
    out = bench.fresh()
    finished = bench.finished(old)
    if begun:
        bench.run(old, out, at=40, action="kill")
    else:
        shutil.copytree(finished, out)
    if not killed(bench.run(new, out, "--restart", at=at, action="kill"), out, tally):
        return False
    problems = claims_nothing_wrong(bench, old, new, out)
    done(out, tally, problems, begins_anew(bench, new, out), f"killed before operation {at}")
    return True


def claims_nothing_wrong(bench: Bench, old: str, new: str, out: Path) -> list[str]:
    """Whoever says that the folder is complete must be right: verify, the old command, the new one without --restart."""
    files, problems = visible(tree(out.parent)), []
    whole = [name for name in (old, new) if files == visible(bench.reference(name).tree)]
    outcome = bench.verify(out)
    if outcome.code not in (0, 1) or (outcome.code == 0 and not whole):
        problems.append(f"verify of a folder that is neither of the two: {outcome}")
    for name in (old, new):
        copied = bench.fresh()
        shutil.copytree(out.parent, copied.parent, dirs_exist_ok=True)
        outcome = bench.run(name, copied)
        wrong = differences(tree(copied.parent), bench.reference(name).tree) if outcome.code == 0 else []
        if outcome.code not in (0, 1) or (outcome.code == 1 and not outcome.one_line):
            problems.append(f"{name} without --restart: {outcome}")
        problems += [f"{name} without --restart succeeds, and {x}" for x in wrong]
        shutil.rmtree(copied.parent)
    return problems


def begins_anew(bench: Bench, name: str, out: Path) -> list[str]:
    outcome = bench.run(name, out, "--restart")
    if outcome.code or outcome.err:
        return [f"the same command: {outcome}"]
    return is_result(bench, name, out)


# --- signals that can be answered ------------------------------------------------------------------------------------


def interrupt(bench: Bench, name: str, rng: random.Random, tally: Tally) -> None:
    """SIGTERM or SIGINT at a random moment: one line, an exit code, and the same command goes on."""
    out, number = bench.fresh(), rng.choice(list(CODES))
    delay = rng.uniform(0, bench.reference(name).seconds * 1.1)
    run = bench.start(name, out, "--workers", rng.choice((1, 2)))
    time.sleep(delay)
    run.send(number)
    outcome = run.wait()
    problems = []
    if outcome.code != 0:
        tally.stopped += 1
        said = outcome.one_line and "same command" in outcome.err
        problems = [] if outcome.code == CODES[number] and said else [str(outcome)]
    problems += stopped_well(bench, name, out)
    kept = Kept(tally, out)
    end = ends_well(bench, name, out)
    done(out, tally, problems + kept.check(), end, f"{number.name} after {delay:.4f} s")


# --- two runs --------------------------------------------------------------------------------------------------------


def two_at_once(bench: Bench, first: str, second: str, rng: random.Random, tally: Tally, *, kill: bool = False) -> None:
    """Two runs for one folder, one a moment after the other: one of them does the work, perhaps after the other's death."""
    out, offset = bench.fresh(), rng.uniform(0, 1.1) ** 3 * bench.reference(first).seconds  # most of them close together
    runs = [bench.start(first, out)]
    time.sleep(offset)
    runs.append(bench.start(second, out))
    if kill:
        time.sleep(rng.uniform(0, bench.reference(first).seconds))
        runs[0].send(signal.SIGKILL)
    outcomes = [run.wait() for run in runs]
    told = [str(o) for o in outcomes]
    names = [n for n, o in zip((first, second), outcomes, strict=True) if o.code == 0]
    problems = refusals(first == second, out, [o for o in outcomes if o.code != 0 and o.code != -signal.SIGKILL])
    tally.stopped += sum(o.code != 0 for o in outcomes)
    worked = [o for o in outcomes if o.code == 0 and "complete" not in o.out]
    if len(worked) != 1 and not kill:
        problems.append(f"{len(worked)} runs did the work: {told}")
    if kill and not names:  # both may have been stopped; whoever began goes on
        names = [n for n in dict.fromkeys((first, second)) if bench.run(n, out).code == 0]
    end = is_result(bench, names[0], out) if names else ["nobody can finish"]
    done(out, tally, problems, end, f"{second} {offset:.4f} s after {first}{', which is killed' if kill else ''}: {told}")


def refusals(same: bool, out: Path, outcomes: list[Outcome]) -> list[str]:
    """Another run is at work: 75. Another plan's folder: 1."""
    return [
        f"the refused run: {o}"
        for o in outcomes
        if not o.one_line or o.out or str(out) not in o.err or o.code not in ((75,) if same else (1, 75))
    ]


def stand_still(bench: Bench, name: str, at: int, tally: Tally) -> bool:
    """A run stands still before its at-th file operation while another one comes, then goes on."""
    out = bench.fresh()
    slow = bench.start(name, out, at=at, action="stop")
    if slow.wait().code is not None:
        shutil.rmtree(out.parent)
        return False
    other = bench.run(name, out)
    result = result_of(out)
    slow.send(signal.SIGCONT)
    outcome = slow.wait()
    tally.stopped += 1
    problems = refusals(True, out, [o for o in (other, outcome) if o.code != 0])
    if other.code == 0 and result_of(out) != result:
        problems.append(f"a result is finished, then changed by the run that stood still: {outcome}")
    if 0 not in (other.code, outcome.code):
        problems.append("nobody did the work")
    where = bench.reference(name).before(at)
    done(out, tally, problems, is_result(bench, name, out), f"stood still {where} while another run came ({other})")
    return True


def result_of(out: Path) -> dict[str, tuple[int, int]]:
    """Which files have their final names, and when each was written."""
    return {name: stamp for name, stamp in stamps(out.parent).items() if name in visible({name: b""})}


# --- a Ray cluster ---------------------------------------------------------------------------------------------------


def kill_on_ray(bench: Bench, name: str, rng: random.Random, tally: Tally) -> None:
    """A worker is killed, whose file is written again; or the command, and the next one, with Ray or without, goes on at
    once, beside workers that have not heard of it."""
    out, whom = bench.fresh(), rng.choice(("the command", "a worker"))
    run = bench.start(name, out, "--ray", "auto", "--workers", 1)
    patience = time.monotonic() + 60
    while not (working := at_work()) and not (out.parent / MANIFEST).exists() and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, bench.reference(name).seconds))
    if whom == "the command":
        run.send(signal.SIGKILL)
    elif working := at_work() or working:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(working), signal.SIGKILL)
            tally.stopped += 1
    outcome, problems = run.wait(), []
    if whom == "the command" and outcome.code == -signal.SIGKILL:
        tally.stopped += 1
        again = bench.run(name, out, *rng.choice(((), ("--ray", "auto"))))
        problems = [f"the same command: {again}"] if again.code else []
    elif outcome.code:
        problems = [f"{whom} was killed: {outcome}"]
    done(out, tally, problems, is_result(bench, name, out), f"kill -9 of {whom} of a Ray cluster")


def all_on_ray(bench: Bench, names: list[str], kills: int, seed: int) -> list[Tally]:
    """So many kills, over the commands in turn."""
    tallies = {name: Tally(name) for name in names}
    for trial, name in enumerate(cycle(names)):
        if sum(t.stopped for t in tallies.values()) >= kills:
            return list(tallies.values())
        kill_on_ray(bench, name, random.Random(seed * 100_003 + trial), tallies[name])
    raise AssertionError


# --- a source that changes -------------------------------------------------------------------------------------------


def source_changes(bench: Bench, name: str, how: str, at: int, tally: Tally) -> None:
    """The source is damaged while the run is at work, right before its at-th file operation: it must not finish."""
    out = bench.fresh()
    source = Path(shutil.copytree(bench.folder / COMMANDS[name][1], out.parent / "src"))
    weights = str(next(p for p in sorted(source.rglob("*.safetensors"))))
    outcome = bench.run(name, out, source=source, at=at, action=how, target=weights)
    problems = [] if outcome.code in (1, 75) and outcome.one_line else [f"does not refuse: {outcome}"]
    problems += ["the folder claims to be complete"] if (out.parent / MANIFEST).exists() else []
    tally.stopped += outcome.code != 0
    tally.add(problems, f"source: {how} {bench.reference(name).before(at)}")
    shutil.rmtree(out.parent)


def while_reading(bench: Bench, name: str, moments: int) -> list[int]:
    """Moments before the last write to a weight file; of a result that is shared among ranks, the unsplit one's."""
    operations = bench.reference(name).operations
    writes = [i for i, x in enumerate(operations, 1) if x.startswith("pwrite ") and x.endswith(f".safetensors{PARTIAL}")]
    folder = operations[writes[0] - 1].rpartition("/")[0] + "/"
    last = max(i for i in writes if operations[i - 1].startswith(folder))
    return [round(1 + (last - 1) * i / max(1, moments - 1)) for i in range(moments)]


# --- the long version ------------------------------------------------------------------------------------------------


def all_kills(bench: Bench, names: list[str], kills: int, seed: int, between: Between | None = None) -> list[Tally]:
    """So many kills that met a run at work, over the commands in turn."""
    tallies = {name: Tally(name) for name in names}
    for trial, name in enumerate(cycle(names)):
        if sum(t.stopped for t in tallies.values()) >= kills:
            return list(tallies.values())
        kill_at_random(bench, name, random.Random(seed * 100_003 + trial), tallies[name], between)
    raise AssertionError


def all_moments(bench: Bench, names: list[str], every: int) -> list[Tally]:
    """Every so manyth file operation of each command."""
    tallies = [Tally(name) for name in names]
    for tally in tallies:
        next(at for at in count(1, every) if not kill_before(bench, tally.command, at, tally))
    return tallies


def all_restarts(bench: Bench, pairs: list[tuple[str, str]], every: int) -> list[Tally]:
    tallies = []
    for old, new in pairs:
        for begun in (False, True):
            tally = Tally(f"{new} --restart over {old}{', begun' * begun}")
            next(at for at in count(1, every) if not kill_restart_before(bench, old, new, at, tally, begun=begun))
            tallies.append(tally)
    return tallies


def all_interrupts(bench: Bench, names: list[str], trials: int, seed: int) -> list[Tally]:
    tallies = {name: Tally(name) for name in names}
    for trial, name in zip(range(trials), cycle(names)):
        interrupt(bench, name, random.Random(seed * 100_003 + trial), tallies[name])
    return list(tallies.values())


def all_twos(bench: Bench, names: list[str], trials: int, seed: int) -> list[Tally]:
    tallies = {name: Tally(name) for name in names}
    for trial, (i, name) in zip(range(trials), cycle(enumerate(names))):
        rng = random.Random(seed * 100_003 + trial)
        other = name if rng.random() < 0.6 else names[i - 1]
        two_at_once(bench, name, other, rng, tallies[name], kill=rng.random() < 0.3)
    return list(tallies.values())


def all_stand_stills(bench: Bench, names: list[str], every: int) -> list[Tally]:
    tallies = [Tally(name) for name in names]
    for tally in tallies:
        next(at for at in count(1, every) if not stand_still(bench, tally.command, at, tally))
    return tallies


def all_changes(bench: Bench, names: list[str], moments: int = 8) -> list[Tally]:
    tallies = [Tally(name) for name in names]
    for tally in tallies:
        for how in ("poke", "truncate", "delete"):
            for at in while_reading(bench, tally.command, moments):
                source_changes(bench, tally.command, how, at, tally)
    return tallies


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, metavar="N", help="kill -9 at N random moments [200]")
    parser.add_argument("--every", type=int, metavar="N", help="kill -9 or stop before every Nth file operation [5]")
    parser.add_argument("--signals", type=int, metavar="N", help="SIGTERM or SIGINT at N random moments [60]")
    parser.add_argument("--two", type=int, metavar="N", help="N pairs of runs at once [60]")
    parser.add_argument("--clock", type=int, metavar="N", help="N kills, and a clock that goes backwards [30]")
    parser.add_argument("--ray", type=int, metavar="N", help="kill -9 of a run on a Ray cluster, or of a worker, N times [20]")
    parser.add_argument("--changes", action="store_true", help="sources that change under the run")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work [a temporary folder]")
    found = parser.parse_args()
    if not any((found.kills, found.every, found.signals, found.two, found.clock, found.ray, found.changes)):
        found.ray = 20 if find_spec("ray") else 0
        found.kills, found.every, found.signals, found.two, found.clock, found.changes = 200, 5, 60, 60, 30, True
    return found


def main() -> int:
    """Every scenario that was asked for, a table each; 1 if anything failed."""
    asked = arguments()
    names, failed = asked.commands, 0
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="ernie-quant-faults-"))
    with contextlib.ExitStack() as stack:
        if asked.ray:
            stack.enter_context(nodes())
        bench = stack.enter_context(Bench(folder))
        for title, wanted, work in (
            ("kill -9 at random moments", asked.kills, lambda: all_kills(bench, names, asked.kills, asked.seed)),
            ("kill -9 before a file operation", asked.every, lambda: all_moments(bench, names, asked.every)),
            ("the same with --restart", asked.every, lambda: all_restarts(bench, pairs(names), asked.every)),
            ("SIGTERM and SIGINT", asked.signals, lambda: all_interrupts(bench, names, asked.signals, asked.seed)),
            ("two runs at once", asked.two, lambda: all_twos(bench, names, asked.two, asked.seed)),
            ("one run stands still, another comes", asked.every, lambda: all_stand_stills(bench, names, asked.every)),
            ("clock going backwards", asked.clock, lambda: all_kills(bench, names, asked.clock, asked.seed, another_year)),
            ("on a Ray cluster", asked.ray, lambda: all_on_ray(bench, names, asked.ray, asked.seed)),
            ("the source changes", asked.changes, lambda: all_changes(bench, names)),
        ):
            if wanted:
                begin = time.monotonic()
                tallies = work()
                failed |= show(f"{title}, {time.monotonic() - begin:.0f} s", tallies)
    if not failed and not asked.folder:
        shutil.rmtree(folder)
    return failed


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Each command over the result of the one before it."""
    return [(names[i - 1], name) for i, name in enumerate(names) if len(names) > 1]


if __name__ == "__main__":
    sys.exit(main())
