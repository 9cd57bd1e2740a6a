"""Runs that are stopped, refused or begun anew: nothing is lost, and nothing is overwritten."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import Command
from helpers.disk import contents, stamps
from helpers.models import random_model, tensors
from helpers.runs import OF_128S, SMALL, SOURCE, Killed, everything, planned, stop_in_second_shard
from safetensors.torch import save_file

from ernie_quant.codecs.rtn import RoundToNearest
from ernie_quant.errors import OutputError, RetryError
from ernie_quant.planning import recipe
from ernie_quant.result.room import BYTES_PER_TENSOR
from ernie_quant.run import whole
from ernie_quant.run.whole import run_plan
from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- interrupted -----------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    plan, out = planned(), tmp_path / "killed/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    first = plan.shards[0].filename
    assert {p.name for p in out.iterdir()} == {first, ".ernie-quant"}  # nothing half-written under a final name
    before = stamps(out)
    result = run_plan(plan, out)
    assert stamps(out)[first] == before[first]
    assert len(result.reports) == len(plan.steps)
    run_plan(plan, tmp_path / "straight/out")
    assert contents(out) == contents(tmp_path / "straight/out")


def test_finished_files_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, written = planned(), []
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    original = whole.run_shard
    monkeypatch.setattr(whole, "run_shard", lambda job, **how: written.append(job.shard) or original(job, **how))
    done: list[int] = []
    run_plan(plan, tmp_path / "out", progress=done.append)
    assert [s.filename for s in written] == [s.filename for s in plan.shards[1:]]
    assert sum(done) == sum(step.spec.nbytes for step in plan.steps)  # the bar reaches its end


def test_a_finished_file_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    plan, out = planned(), tmp_path / "killed/out"
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    os.truncate(out / plan.shards[0].filename, 100)
    run_plan(plan, out)
    run_plan(plan, tmp_path / "straight/out")
    assert contents(out) == contents(tmp_path / "straight/out")


def test_nan_in_a_weight_stops_the_run_with_its_name(command: Command, tmp_path: Path) -> None:
    source, name = random_model(tmp_path / "src", layouts.PT, **OF_128S), "model.layers.1.mlp.experts.1.up_proj.weight"
    table = tensors(source)
    table[name][5, 7] = float("nan")
    save_file(table, source / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("wint4", source, tmp_path / "out", "--experts-only")
    assert (code, err) == (1, f"error: {name}: holds NaN or infinity, which cannot be quantized\n")
    assert not list((tmp_path / "out").glob("model*"))


SLEEPER = """
import pathlib, signal, sys, time
from contextlib import contextmanager
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background may have it ignored
from ernie_quant.cli import _progress, main
out, flag = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[3] + ".ready")
@contextmanager
def progress_bar(*_):
    def progress(_):
        if len(list(out.glob("*.safetensors"))) == 2:
            flag.touch()
            time.sleep(60)
    progress.file = lambda _: None
    yield progress
_progress.progress_bar = progress_bar
main.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_one_line_and_it_can_go_on(number: int, code: int, command: Command, tmp_path: Path) -> None:
    arguments = ["convert", str(SOURCE), str(tmp_path / "a/out"), "--to", "pt", "--max-shard-size", str(SMALL)]
    (tmp_path / "a").mkdir()
    with subprocess.Popen([sys.executable, "-c", SLEEPER, *arguments], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a/out.ready").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert err.strip() == "interrupted; the same command goes on where it stopped"
    before = stamps(tmp_path / "a/out")
    assert len(before) == 2
    assert command(*arguments)[0] == 0
    assert before.items() <= stamps(tmp_path / "a/out").items()
    arguments[2] = str(tmp_path / "b/out")
    assert command(*arguments)[0] == 0
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_complete_and_not_touched(command: Command, tmp_path: Path) -> None:
    arguments = ("convert", SOURCE, tmp_path / "out", "--to", "pt")
    assert command(*arguments)[0] == 0
    before, written = contents(tmp_path / "out"), stamps(tmp_path / "out")
    assert command(*arguments) == (0, f"{tmp_path / 'out'}: complete\n", "")
    assert contents(tmp_path / "out") == before
    assert stamps(tmp_path / "out") == written
    assert not (tmp_path / "out/.ernie-quant").exists()


def test_another_recipe_does_not_touch_a_finished_folder(tmp_path: Path) -> None:
    run_plan(planned(), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="holds the result of another plan"):
        run_plan(planned(rules=everything(RoundToNearest(8, 32))), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_another_recipe_does_not_go_on_with_a_begun_folder(tmp_path: Path) -> None:
    plan = planned()
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    with pytest.raises(OutputError, match="holds the beginning of another plan"):
        run_plan(planned(rules=everything(RoundToNearest(8, 32))), tmp_path / "out")


@pytest.mark.parametrize("begun", [False, True])
def test_restart_begins_anew(begun: bool, tmp_path: Path) -> None:
    old, new = planned(), planned(rules=everything(RoundToNearest(8, 32)), shard_bytes=10**9)
    if begun:
        with pytest.raises(Killed):
            run_plan(old, tmp_path / "a/out", progress=stop_in_second_shard(old))
    else:
        run_plan(old, tmp_path / "a/out")
    run_plan(new, tmp_path / "a/out", restart=True)
    run_plan(new, tmp_path / "b/out")
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_restart_leaves_a_strangers_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="was not made by ernie-quant"):
        run_plan(planned(), tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == {"model.safetensors": b"precious"}


@pytest.mark.parametrize("options", [(), ("--restart",)], ids=["again", "restart"])
def test_a_second_run_is_refused_and_harms_nothing(options: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    plan, out = planned(rules=recipe.KEEP_ALL), tmp_path / "a/out"
    answers: list[tuple[int, str, str]] = []

    def progress(_: int) -> None:
        if len(list(out.glob("*.safetensors"))) == 2 and not answers:
            answers.append(command("convert", SOURCE, out, "--to", "pt", "--max-shard-size", SMALL, *options))

    run_plan(plan, out, progress=progress)
    assert answers == [(75, "", f"error: {out}: another run is at work in this folder\n")]
    run_plan(plan, tmp_path / "b/out")
    assert contents(out) == contents(tmp_path / "b/out")


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OutputError, match=r"cannot be locked \(No locks available\); choose a folder on another disk"):
        run_plan(planned(), tmp_path / "out")


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    free = plan.disk_bytes + BYTES_PER_TENSOR * len(plan.steps) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(RetryError, match="more than the disk has free"):
        run_plan(plan, tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []
    free += 1
    run_plan(plan, tmp_path / "new/out")


def test_space_that_finished_files_take_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    with pytest.raises(Killed):
        run_plan(plan, tmp_path / "out", progress=stop_in_second_shard(plan))
    free = plan.disk_bytes + BYTES_PER_TENSOR * len(plan.steps) - (tmp_path / "out" / plan.shards[0].filename).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    run_plan(plan, tmp_path / "out")


def test_a_disk_that_fills_up_is_worth_a_retry(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["convert", SOURCE, tmp_path / "a/out", "--to", "pt", "--max-shard-size", SMALL, "--workers", 2]
    write_at, calls = os.pwrite, 0

    def full(fd: int, data: bytes, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_at(fd, data, at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        code, out, err = command(*arguments)
    assert (code, out) == (75, "")
    assert re.fullmatch(
        r"error: .*/out/model-\d+-of-\d+\.safetensors: No space left on device; the same command goes on .*\n", err
    )
    assert not list((tmp_path / "a/out").glob("*.partial"))
    before = stamps(tmp_path / "a/out")
    assert before
    assert command(*arguments)[0] == 0
    assert before.items() <= stamps(tmp_path / "a/out").items()
    arguments[2] = tmp_path / "b/out"
    assert command(*arguments)[0] == 0
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")


def test_a_full_disk_at_the_first_write_is_worth_a_retry_too(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert command("convert", SOURCE, tmp_path / "out", "--to", "pt")[0] == 75
