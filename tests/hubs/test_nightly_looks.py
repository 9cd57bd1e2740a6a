"""`nightly --dry-run`, several jobs in one command, and how little a target costs that is there already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.hub import HubProcess, LoopbackHub
from helpers.hubs import ADDRESS, NAME, SOURCE, uploads, weights_asked, writes
from helpers.nights import PT, WINT4, Night, job_file

from ernie_quant.nightly import run as nightly
from ernie_quant.nightly.job import read_job

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures")]
WORSE = '[[target]]\nrepo = "me/tiny-worse"\nrecipe = "wint4"\ngroup_size = 64\n'


# --- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_made_and_writes_nothing(
    hub: LoopbackHub, night: Night, command: Command, tmp_path: Path
) -> None:  # fmt: skip
    assert night(PT).status == "published"
    hub.requests.clear()
    job, work = job_file(tmp_path, WINT4, PT), tmp_path / "elsewhere"
    code, out, err = command("nightly", job, "--work", work, "--dry-run")
    assert (code, err) == (0, "")
    first, wint4, pt = out.splitlines()
    assert first.startswith(f"planned: {ADDRESS} at ")
    assert wint4 == f"  planned: me/tiny-wint4: 0.00 GB would be made and published; token of {hub.user}"
    assert pt.startswith("  up-to-date: me/tiny-pt: commit ")
    assert writes(hub) == []
    assert weights_asked(hub) == []
    assert not work.exists()
    found = json.loads(command("nightly", job, "--work", work, "--dry-run", "--json")[1])
    assert [(t["status"], t["account"]) for t in found["targets"]] == [("planned", hub.user), ("up-to-date", hub.user)]
    assert found["targets"][0]["bytes"] > 100_000


def test_what_was_begun_would_be_finished(hub: LoopbackHub, night: Night) -> None:
    night.place(WINT4).mkdir(parents=True)
    result = nightly.look(read_job(job_file(night.folder, WINT4)), night.work)
    assert result.targets[0].begun


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_token_that_is_none_is_told(
    token: str, hub: LoopbackHub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    job = job_file(tmp_path, WINT4, source=SOURCE)
    code, out, err = command("nightly", job, "--work", tmp_path / "work", "--dry-run")
    assert (code, err) == (1, "")
    assert "  failed: me/tiny-wint4: " in out
    assert "token" in out.splitlines()[1]
    assert "Traceback" not in out


# --- several jobs ----------------------------------------------------------------------------------------------------


def test_several_jobs_are_done_and_one_that_fails_does_not_stop_the_others(
    hub: LoopbackHub, command: Command, tmp_path: Path
) -> None:  # fmt: skip
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    one, three = job_file(tmp_path / "one", WINT4), job_file(tmp_path / "three", PT)
    two = job_file(tmp_path / "two", WORSE, source="hf://baidu/there-is-none")
    work = tmp_path / "work"
    code, out, _ = command("nightly", one, two, three, "--work", work)
    assert code == 1
    lines = out.splitlines()
    assert [line.partition(":")[0].strip() for line in lines] == ["published", "published", "failed", "published", "published"]
    assert lines[2].startswith("failed: hf://baidu/there-is-none: ")
    assert set(hub.store.repos) >= {"me/tiny-wint4", "me/tiny-pt"}
    code, out, _ = command("nightly", one, three, "--work", work, "--json")
    found = json.loads(out)
    assert (code, found["status"], len(found["jobs"])) == (0, "up-to-date", 2)


def test_two_jobs_for_one_repository_are_a_mistake(command: Command, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = job_file(tmp_path / "one", WINT4), job_file(tmp_path / "two", WINT4, PT)
    code, out, err = command("nightly", one, two, "--check")
    assert (code, out) == (1, "")
    assert f"me--tiny-wint4@main: is made by {one} and by {two}" in err


def test_every_file_has_a_line_in_the_log(hub: LoopbackHub, night: Night) -> None:
    assert night(WINT4).status == "published"
    files = [event for event in night.events if event["event"] == "file"]
    assert [event["number"] for event in files] == [1, 2, 3, 4]
    assert {event["of"] for event in files} == {4}
    assert all(event["seconds"] > 0 and event["gb_per_second"] >= 0 and event["nbytes_in"] > 0 for event in files)
    assert sum(event["nbytes"] for event in files) > 100_000


# --- what is there already -------------------------------------------------------------------------------------------


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # whoever imports it gets an ImportError
sys.argv = ["ernie-quant", *sys.argv[1:]]
from ernie_quant.cli.main import main
main()
"""


def test_an_unchanged_target_costs_no_torch(tmp_path: Path) -> None:
    """Nor does a dry run."""
    job = job_file(tmp_path, PT)
    with HubProcess(tmp_path / "server") as hub:
        hub.call("put", repo=NAME, folder=str(SOURCE))
        environment = hub.environment(tmp_path / "home")

        def run(*options: str, program: str = WITHOUT_TORCH) -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-c", program, "nightly", str(job), "--work", str(tmp_path / "work"), *options]
            return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)

        looked = run("--dry-run")
        assert (looked.returncode, looked.stdout.splitlines()[0].partition(":")[0]) == (0, "planned"), looked.stderr
        made = run(program=WITHOUT_TORCH.replace('sys.modules["torch"] = None', "pass"))
        assert made.returncode == 0, made.stdout + made.stderr
        again = run()
        assert (again.returncode, again.stdout.splitlines()[0].partition(":")[0]) == (0, "up-to-date"), (
            again.stdout + again.stderr
        )
