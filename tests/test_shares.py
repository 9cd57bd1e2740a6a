"""Several processes write a share of the files each, at any time and anywhere, and `merge` makes it what one run writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import Command, refusal
from helpers.disk import contents, stamps
from helpers.models import copy
from helpers.runs import SOURCE, Killed, planned, stop_in_second_shard

from ernie_quant.disk import hold
from ernie_quant.errors import PlanError, RetryError
from ernie_quant.planning.share import Share, check_sharing, shares
from ernie_quant.planning.steps import Shard
from ernie_quant.run.share import ShareResult, run_share
from ernie_quant.run.whole import run_plan

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
OPTIONS = ("--group-size", 32, "--mtp", "--max-shard-size", 60_000)
FILES = 4


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run writes."""
    from click.testing import CliRunner
    from ernie_quant.cli.main import group

    out = tmp_path_factory.mktemp("wanted") / "out"
    done = CliRunner().invoke(group, ["wint4", *map(str, (SOURCE, out, *OPTIONS))])
    assert done.exit_code == 0
    found = contents(out)
    assert len([name for name in found if name.endswith(".safetensors")]) == FILES
    return found


def share(command: Command, out: Path, index: int, of: int, *more: object, source: Path = SOURCE) -> tuple[int, str, str]:
    return command("wint4", source, out, *OPTIONS, "--shard-index", index, "--num-shards", of, *more)


@pytest.mark.parametrize("of", [1, 2, 5])
def test_shares_and_a_merge_are_one_run(of: int, command: Command, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    """In any order; five shares of four files leave one with nothing to do."""
    out, files = tmp_path / "out", []
    for index in reversed(range(of)):
        code, said, err = share(command, out, index, of, "--json")
        assert (code, err) == (0, "")
        told = json.loads(said)
        assert (told["status"], told["shard_index"], told["num_shards"], told["files_before"]) == ("share", index, of, 0)
        files += told["files"]
        assert not (out / "ernie-quant.json").exists()
    assert sorted(files) == sorted(name for name in wanted if name.endswith(".safetensors"))
    before = stamps(out)
    code, said, err = command("merge", out)
    assert (code, err) == (0, "")
    assert f"in {FILES} file(s) ({FILES} were finished before)" in said
    assert contents(out) == wanted
    assert stamps(out) == before
    assert command("merge", out) == (0, f"{out}: complete\n", "")
    assert share(command, out, 0, of) == (0, f"{out}: complete\n", "")


def test_what_a_share_says(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        share(command, out, 1, 2)[1]
        == f"{out}: share 1 of 2: 2 of {FILES} file(s). After the last share:\n  ernie-quant merge {out}\n"
    )
    assert "(2 were finished before)" in share(command, out, 1, 2)[1]


def test_merge_names_what_is_missing_and_whose_it_is(command: Command, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    assert share(command, out, 1, 3)[0] == 0
    err = refusal(command, "merge", out)
    weights = sorted(name for name in wanted if name.endswith(".safetensors"))
    assert err.startswith(f"error: {out}: ")
    assert f"of {FILES} files are not there: {weights[0]} (--shard-index 0)" in err
    assert "(--shard-index 2)" in err
    assert "(--shard-index 1)" not in err
    for index in (0, 2):
        assert share(command, out, index, 3)[0] == 0
    (out / weights[0]).write_bytes(b"damaged")
    assert f"1 of {FILES} files are not there: {weights[0]} (--shard-index 0); run those" in refusal(command, "merge", out)
    assert share(command, out, 0, 3)[0] == 0
    assert command("merge", out, "--quiet") == (0, "", "")
    assert contents(out) == wanted


def test_a_whole_run_and_shares_take_over_from_each_other(command: Command, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    out = tmp_path / "a/out"
    assert share(command, out, 0, 2)[0] == 0
    before = stamps(out)
    assert command("wint4", SOURCE, out, *OPTIONS, "--quiet")[0] == 0
    assert contents(out) == wanted
    assert before.items() <= stamps(out).items()

    plan, out = planned(), tmp_path / "b/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    before = stamps(out)
    done = [run_share(plan, out, Share(index, 2), {}) for index in range(2)]
    assert [result.files_before for result in done if isinstance(result, ShareResult)] == [1, 0]
    assert before.items() <= stamps(out).items()
    run_plan(plan, out)
    run_plan(plan, tmp_path / "c/out")
    assert contents(out) == contents(tmp_path / "c/out")


def test_another_number_of_shares_goes_on_with_what_is_there(command: Command, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    assert share(command, out, 0, 4)[0] == 0
    for index in (0, 1):
        assert share(command, out, index, 2)[0] == 0
    assert command("merge", out)[0] == 0
    assert contents(out) == wanted


def test_who_is_at_work_is_not_disturbed(command: Command, tmp_path: Path) -> None:
    """A share beside itself, a whole run or merge beside shares, shares of another number."""
    plan, out = planned(), tmp_path / "out"
    seen: dict[str, str] = {}

    def meanwhile(_: int) -> None:
        if seen:
            return
        for name, work in {
            "itself": lambda: run_share(plan, out, Share(0, 2), {}),
            "whole": lambda: run_plan(plan, out),
            "number": lambda: run_share(plan, out, Share(2, 3), {}),
        }.items():
            with pytest.raises(RetryError) as refused:
                work()
            seen[name] = str(refused.value)
        assert isinstance(run_share(plan, out, Share(1, 2), {}), ShareResult)
        code, _, seen["merge"] = command("merge", out)
        assert code == 75

    run_share(plan, out, Share(0, 2), {}, progress=meanwhile)
    assert seen == {
        "itself": f"{out}: share 0 of 2 is at work already",
        "whole": f"{out}: another run is at work in this folder",
        "number": f"{out}: share 0 of 2 is at work; wait for it, or say --num-shards 2",
        "merge": f"error: {out}: share 0 of 2 is still at work; merge when it is done\n",
    }
    with hold(out / ".ernie-quant/lock", ""), pytest.raises(RetryError, match="another run is at work in this folder"):
        run_share(plan, out, Share(0, 2), {})


def test_half_written_files_of_another_share_are_left_alone(tmp_path: Path) -> None:
    plan, out = planned(), tmp_path / "out"
    run_share(plan, out, Share(0, 2), {})
    mine, others = (out / f"{files[0].filename[:-12]}.12345678.safetensors.partial" for files in shares(plan.shards, 2))
    for partial in (mine, others):
        partial.write_bytes(b"half")
    run_share(plan, out, Share(0, 2), {})
    assert (mine.exists(), others.exists()) == (False, True)
    run_plan(plan, out)
    assert not list(out.rglob("*.partial"))


def test_a_source_that_has_moved(command: Command, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    source = copy(SOURCE, tmp_path / "moe/paddle")
    assert share(command, tmp_path / "out", 0, 1, source=source)[0] == 0
    moved = source.rename(tmp_path / "moe/elsewhere").rename(tmp_path / "paddle")
    out = tmp_path / "out"
    line = f"{source}: the source of {out} is not there; merge needs its small files: merge {out} --source SRC"
    assert refusal(command, "merge", out) == f"error: {line}\n"
    assert command("merge", tmp_path / "out", "--source", moved)[0] == 0
    assert contents(tmp_path / "out") == wanted


def test_the_source_may_be_named_relative_to_where_one_stands(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    copy(SOURCE, tmp_path / "here/src")
    (tmp_path / "here/rules.toml").write_text('[[rule]]\nrole = "experts"\ncodec = "rtn"\ngroup_size = 32\n')
    (tmp_path / "here/src/a.mine").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    line = ("quantize", "src", "out", "--recipe", "rules.toml", "--copy", "*.mine")
    assert command(*line, "--shard-index", 0, "--num-shards", 1)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert command("merge", "here/out")[::2] == (0, "")
    assert (tmp_path / "here/out/a.mine").is_file()
    monkeypatch.chdir(tmp_path / "here")
    assert command(*line) == (0, "out: complete\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--shard-index", 1), "--shard-index I and --num-shards N go together"),
        (("--num-shards", 1), "--shard-index I and --num-shards N go together"),
        (("--shard-index", 3, "--num-shards", 3), "--shard-index 3: of --num-shards 3 there are 0 to 2"),
        (("--shard-index", 0, "--num-shards", 3, "--restart"),
         "--restart would drop what other shares have written; delete OUT, then start all shares"),
        (("--shard-index", 0, "--num-shards", 3, "--ray", "auto"),
         "--ray writes all files itself; leave --shard-index and --num-shards out"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(words: tuple[object, ...], line: str, command: Command, tmp_path: Path) -> None:
    code, _, err = command("convert", SOURCE, tmp_path / "out", "--to", "pt", *words)
    assert (code, err.splitlines()[-1]) == (2, f"Error: {line}")


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "holds no shares of a result"),
        ({"mine.txt": "text"}, "holds no shares of a result"),
        ({".ernie-quant/plan.json": "{}"}, "was begun by one run, not by shares; run the same command again"),
        ({".ernie-quant/shares.json": "{"}, "shares.json"),
        ({".ernie-quant/shares.json": "{}"}, "says of how many shares the result is: None"),
        ({".ernie-quant/shares.json": '{"num_shards": 2, "command": "publish", "source": "a", "options": []}'}, "does not say"),
        ({".ernie-quant/shares.json": '{"num_shards": 2, "command": "wint4", "source": "a", "options": 1}'}, "does not say"),
    ],
)  # fmt: skip
def test_merge_of_something_else(files: dict[str, str], line: str, command: Command, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    assert line in refusal(command, "merge", tmp_path / "out")


def test_what_has_no_shares() -> None:
    with pytest.raises(PlanError, match="a calibrated model is made layer after layer by one process"):
        check_sharing(replace(planned(), calibration=object()))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="--tp 2 quantizes once for all ranks; write it without --tp, merge, then reshard --tp 2"):
        check_sharing(planned(), tp=2)


@pytest.mark.parametrize(
    ("sizes", "of", "wanted"),
    [
        ([5, 5, 5, 1], 4, [[5], [5], [5], [1]]),
        ([5, 5, 5, 1], 2, [[5, 5], [5, 1]]),
        ([1, 1, 1, 9], 2, [[1, 1, 1], [9]]),
        ([3], 3, [[3], [], []]),
        ([0, 0], 1, [[0, 0]]),
        ([2, 2, 2, 2, 2], 3, [[2, 2], [2, 2], [2]]),
    ],
)
def test_how_files_are_shared(sizes: list[int], of: int, wanted: list[list[int]]) -> None:
    class Sized(Shard):
        nbytes_in = 0

    files = []
    for size in sizes:
        file = Sized("model", (), {})
        object.__setattr__(file, "nbytes_in", size)
        files.append(file)
    assert [[file.nbytes_in for file in share] for share in shares(files, of)] == wanted


@pytest.mark.slow
def test_three_processes_at_once(tmp_path: Path, wanted: dict[str, bytes], command: Command) -> None:
    """They begin in the same moment, and one is killed and comes again."""
    words = [sys.executable, "-m", "ernie_quant", "wint4", *map(str, (SOURCE, tmp_path / "out", *OPTIONS))]
    lines = [[*words, "--shard-index", str(index), "--num-shards", "3", "--quiet"] for index in range(3)]
    running = [subprocess.Popen(line) for line in lines]
    running[1].kill()
    assert [process.wait() for process in running][::2] == [0, 0]
    assert subprocess.run(lines[1], check=False).returncode == 0
    assert command("merge", tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == wanted
