"""Kill the nightly job at random moments, and see that the next run ends with the repositories of an unbroken one.

python tests/faults/nightly.py --kills 50               # against the loopback hub of tests/helpers/hub, in a process of its own

Every trial has fresh folders and fresh repositories: one or two runs are killed with SIGKILL, one runs to its end, and
one more must have nothing to do. Runs are forked from a process that has imported everything; see _process.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.hub import HubProcess

from faults._process import BUG, Outcome, _wait

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS / "golden/moe/paddle"
REPOS = ("me/tiny-wint4", "me/tiny-pt")
JOB = f"""
[source]
repo = "hf://baidu/tiny"
[[target]]
repo = "{REPOS[0]}"
recipe = "wint4"
group_size = 32
tag = true
max_shard_size = "60kB"
[[target]]
repo = "{REPOS[1]}"
recipe = "pt"
tag = true
max_shard_size = "60kB"
[limits]
disk_budget = "400kB"
"""
NETWORK = 2_000_000  # bytes per second: some of the time must be spent on downloads and uploads


# --- the runs --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """In a process of its own: import everything, then fork one `ernie-quant` for every line of JSON."""
    import huggingface_hub.hf_api
    import torch
    from ernie_quant.cli import nightly  # noqa: F401
    from helpers.models import write

    from ernie_quant.check import verify
    from ernie_quant.codecs.rtn import RoundToNearest
    from ernie_quant.planning import built_in

    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment] # pictures take longer than all the rest, and are files as others
    huggingface_hub.utils.disable_progress_bars()
    rules = built_in.one_codec("wint4", RoundToNearest(4, 32), experts_only=False, mtp=False, keep_unfit=False)
    with tempfile.TemporaryDirectory() as warm:
        write(SOURCE, Path(warm) / "out", recipe=rules)
        verify.verify(Path(warm) / "out")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(f"{_fork(**request) if 'arguments' in request else _wait(request['wait']) if request else 0}\n")
        answers.flush()


def _fork(**request: Any) -> int:
    if Path("/proc/self/task").is_dir():
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    return os.fork() or _run(**request)


def _run(arguments: list[str], cache: str, log: str) -> NoReturn:
    code: Any = BUG
    try:
        for fd, name in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), fd)
        os.environ["ERNIE_QUANT_CACHE"] = cache
        from ernie_quant.cli.main import main

        sys.argv = ["ernie-quant", *arguments]
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Runs:
    """The forking process; one run at a time."""

    def __init__(self, folder: Path, hub: HubProcess) -> None:
        self.log = folder / "run"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._ask({})  # it is ready then

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __call__(self, trial: Trial, kill_after: float | None = None) -> Outcome:
        """A night, to its end or not."""
        arguments = ["nightly", trial.job, "--work", trial.work, "--json"]
        pid = self._ask({"arguments": [str(a) for a in arguments], "cache": str(trial.cache), "log": str(self.log)})
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the number is still its own
        return Outcome(self._ask({"wait": pid}), *(Path(f"{self.log}.{what}").read_text() for what in ("out", "err")))


# --- trials ----------------------------------------------------------------------------------------------------------


class Trial:
    """Fresh folders, fresh repositories."""

    def __init__(self, folder: Path, hub: HubProcess) -> None:
        self.folder, self.hub = folder, hub
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.work, self.cache, self.job = folder / "work", folder / "cache", folder / "job.toml"
        self.job.write_text(JOB)
        for repo in REPOS:
            self._delete(repo)

    def _delete(self, repo: str) -> None:
        organization, name = repo.split("/")
        body = json.dumps({"organization": organization, "name": name}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.hub.token}"}
        request = urllib.request.Request(f"{self.hub.endpoint}/api/repos/delete", body, headers, method="DELETE")
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()
        except urllib.error.HTTPError as error:
            if error.code != 404:  # there is none yet
                raise

    def published(self) -> dict[str, Any]:
        """Names, sizes and hashes at the head of every repository, its tags, and how many commits it took."""
        found = {}
        for repo in REPOS:
            held = self.hub.call("repo", repo=repo)
            head = held["commits"][0]
            files = {name: (file["size"], file["sha256"]) for name, file in head["files"].items()}
            tags = {name: commit == head["id"] for name, commit in held["tags"].items()}
            found[repo] = {"files": files, "tags": tags, "commits": len(held["commits"]), "private": held["private"]}
        return found

    def orphans(self) -> list[str]:
        """Files that nobody needs any more; of a header only its own bytes lie on the disk."""
        left = [p for p in self.work.iterdir() if p.name not in ("lock", "log.jsonl")] if self.work.is_dir() else []
        cached = [p for p in self.cache.rglob("*") if p.name in ("files", "incoming") or p.name.endswith(".partial")]
        return [p.relative_to(self.folder).as_posix() for p in (*left, *cached)]

    def stage(self) -> str:
        """How far the last run had come."""
        log = self.work / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        last = json.loads(lines[-1]) if lines else {"event": "nothing"}
        return {
            "nothing": "start", "source": "start", "target": "download, quantize", "restart": "download, quantize",
            "file": "download, quantize",
            "made": "verify", "verified": "publish", "result": "between targets", "end": "end",
        }[last["event"]]  # fmt: skip


@dataclass
class Tally:
    """What came of all trials."""

    kills: int = 0
    identical: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def trial(runs: Runs, hub: HubProcess, folder: Path, wanted: dict[str, Any], seconds: float, dice: random.Random) -> tuple[
    list[str], list[str]
]:  # fmt: skip
    """Stages at which runs were killed, and what is wrong afterwards."""
    here = Trial(folder, hub)
    stages = []
    for _ in range(dice.choice((1, 2))):
        if runs(here, kill_after=dice.uniform(0, seconds)).code == -signal.SIGKILL:
            stages.append(here.stage())
    return stages, wrong_afterwards(runs, here, wanted)


def wrong_afterwards(runs: Runs, here: Trial, wanted: dict[str, Any]) -> list[str]:
    """The next run finishes, with the same result; the one after that has nothing to do."""
    outcome = runs(here)
    if outcome.code or outcome.err:
        return [f"the next run: {outcome}"]
    found = here.published()
    problems = [
        f"{repo}: {what}: {found[repo][what]} and not {wanted[repo][what]}"
        for repo in REPOS
        for what in wanted[repo]
        if found[repo][what] != wanted[repo][what]
    ]
    problems += [f"left over: {name}" for name in here.orphans()]
    before = len(here.hub.call("requests"))
    outcome = runs(here)
    if outcome.code or outcome.err or json.loads(outcome.out)["status"] != "up-to-date":
        problems.append(f"one more run: {outcome} {outcome.out}")
    later = here.hub.call("requests")[before:]
    problems += [f"one more run asked for {r['method']} {r['path']}" for r in later if r["method"] not in ("GET", "HEAD")]
    return problems + [f"left over by one more run: {name}" for name in here.orphans()]


def all_trials(folder: Path, kills: int, seed: int) -> Tally:
    """As many trials as it takes to kill so many runs."""
    dice, tally = random.Random(seed), Tally()
    shutil.copytree(SOURCE, folder / "seed/baidu/tiny", dirs_exist_ok=True)
    options = ("--seed", str(folder / "seed"), "--chunk-bytes", "65536", "--page-size", "4")
    with HubProcess(folder / "hub", *options) as hub, Runs(folder, hub) as runs:
        hub.call("slow", path="^/(lfs|upload)/", bytes_per_second=NETWORK, times=None)
        unbroken = Trial(folder / "trial", hub)
        begin = time.monotonic()
        outcome = runs(unbroken)
        seconds = time.monotonic() - begin
        assert outcome.code == 0, outcome
        wanted = unbroken.published()
        assert not unbroken.orphans()
        while tally.kills < kills:
            stages, problems = trial(runs, hub, folder / "trial", wanted, seconds, dice)
            tally.kills += len(stages)
            tally.stages.update(stages)
            tally.identical += bool(stages) and not problems
            if problems:
                tally.failures.append(f"killed at {', then '.join(stages)}: {'; '.join(problems)}")
                shutil.copytree(folder / "trial", folder / f"failed-{len(tally.failures)}", dirs_exist_ok=True)
    return tally


def show(tally: Tally, seconds: float) -> int:
    """Print the table and the failures; the exit code."""
    print(f"nightly, kill -9 at random moments, {seconds:.0f} s")
    rows = [("killed while", "runs"), *((stage, str(count)) for stage, count in tally.stages.most_common())]
    for name, count in (*rows, ("all", str(tally.kills)), ("trials that ended identical", str(tally.identical))):
        print(f"{name.ljust(28)}  {count}")
    for failure in tally.failures:
        print(f"FAILED {failure}")
    return int(bool(tally.failures))


def main() -> int:
    """1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for everything; kept")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return 0
    begin = time.monotonic()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="ernie-quant-nightly-"))
    folder.mkdir(parents=True, exist_ok=True)
    failed = show(all_trials(folder, asked.kills, asked.seed), time.monotonic() - begin)
    if not failed and not asked.folder:
        shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
