"""The nightly job: judged as a whole before it starts, harmless when it is stopped, missed or doubled."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, NAME, SOURCE, contents, files_of, weights_asked, writes
from helpers.models import logits, random_model
from test_run import OF_128S

from ernie_quant import publish as publishing
from ernie_quant.check.verify import verify
from ernie_quant.disk import hold
from ernie_quant.errors import PlanError, RetryError
from ernie_quant.hubs.hf.publish import HuggingFacePublisher
from ernie_quant.nightly import run as nightly
from ernie_quant.nightly.job import Job, read_job
from ernie_quant.nightly.run import JobResult, run_job, summary
from ernie_quant.plan.built_in import KINDS
from ernie_quant.sources import open_source

# the client uploads with a deprecated argument of its own HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
pytest_plugins = ["helpers.hubs"]

Command = Callable[..., tuple[int, str, str]]
WINT4 = '[[target]]\nrepo = "me/tiny-wint4"\nrecipe = "wint4"\ngroup_size = 32\nmax_shard_size = "60kB"\n'
PT = '[[target]]\nrepo = "me/tiny-pt"\nrecipe = "pt"\n'


def job_file(folder: Path, *targets: str, source: object = ADDRESS, more: str = "") -> Path:
    path = folder / "job.toml"
    path.write_text(f'[source]\nrepo = "{source}"\n{"".join(targets)}{more}')
    return path


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the rest."""
    monkeypatch.setattr(publishing, "_pictures", lambda found: {})


# --- job files -------------------------------------------------------------------------------------------------------


def mistakes(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(PlanError) as refused:
        read_job(path)
    return refused.value.problems or [str(refused.value)]


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    text = """
        nightly = true
        [source]
        repo = "hf://baidu"
        branch = "main"
        [[target]]
        repo = "tiny"
        recipe = "wint5"
        group_size = 32
        privat = true
        [[target]]
        repo = "ftp://me/tiny"
        recipe = "wint4"
        group_size = 0
        experts_only = "yes"
        wint4_layers = 7
        tp = 2
        max_shard_size = "5 bananas"
        [[target]]
        repo = "me/tiny"
        private = 1
        tag = "v1"
        [[target.rule]]
        codec = "rtn"
        [[target.rule]]
        role = "router"
        codec = "rtn"
        [[target]]
        repo = "hf://me/tiny"
        recipe = "pt"
        effort = 3
        [limits]
        disk_budget = -1
        max_hours = 0
        memory = "1GB"
    """
    found = mistakes(tmp_path, text)
    expected = [
        "[source]: branch: unknown",
        "[source]: hf://baidu: is not SCHEME://ORG/NAME or SCHEME://ORG/NAME@REVISION",
        "[[target]] 1: repo 'tiny' is not ORG/NAME or SCHEME://ORG/NAME",
        "[[target]] 1: recipe 'wint5' is none of pt, paddle, wint4, wint8, fp8, wint2; for others give [[target.rule]] tables",
        "[[target]] 1: privat: unknown",
        "[[target]] 2: repo 'ftp://me/tiny': nothing can be published there; there is ",
        "[[target]] 2: max_shard_size: '5 bananas' is not a size such as 5GB or 500MB",
        "[[target]] 2: experts_only is 'yes', not true or false",
        "[[target]] 2: codec rtn: group_size",
        "[[target]] 2: wint4_layers: unknown",
        "[[target]] 2: tp is 2, not 1, or 2, 4, 8 or 16 with runtime fastdeploy",
        "[[target]] 3: private is 1, not true or false",
        "[[target]] 3: tag is 'v1', not true or false",
        "[[target]] 3: rule 1: needs one of role, match and names",
        "[[target]] 3: rule 2: role 'router' is not one that can be quantized (experts, ",
        "[[target]] 4: effort: unknown",
        "[limits]: memory: unknown",
        "[limits]: max_hours is 0.0, not a number above 0",
        "[limits]: disk_budget: -1 is not a size such as 5GB or 500MB",
        "nightly: unknown; a job has [source], [[target]] and [limits]",
    ]
    assert found.pop().endswith(": is the place of more than one [[target]]")
    assert len(found) == len(expected)
    assert [one for one, begin in zip(found, expected, strict=True) if not one.startswith(begin)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "[source]: is missing"),
        ("source = 1", "[source]: is not a table"),
        ("target = 3", "has no [[target]]"),
        ('target = ["a"]', "[[target]] 1: is not a table"),
        ("[source]", "[source]: repo is missing"),
        ("[source]\nrepo = 5", "[source]: repo is 5, not a text"),
        ('[source]\nrepo = "folder"\nrevision = "main"', "[source]: revision: folder is a folder and has none"),
        ('[source]\nrepo = "ftp://a/b"', "[source]: ftp://a/b: there is no ftp://; there is "),
        (
            '[source]\nrepo = "hf://a/b@c"\nrevision = "d"',
            "[source]: revision 'd' is no name of a branch, tag or commit, or not the only one",
        ),
        ("[[target]]", "[[target]] 1: repo is missing"),
        ("[[target]]", "[[target]] 1: recipe is missing"),
        ('[[target]]\nrepo = "a/b"\nrule = []', "[[target]] 1: rule: has no [[rule]]"),
        ('[[target]]\nrepo = "a/b"\nrule = ["x"]', "[[target]] 1: rule 1: "),
        (
            '[[target]]\nrepo = "a/b"\nrecipe = "fp8"\nruntime = "fastdeploy"',
            "runtime is 'fastdeploy', not vllm or",
        ),
        (
            '[[target]]\nrepo = "a/b"\nrecipe = "wint2"\nwint4_layers = -1',
            "wint4_layers is -1, not a number of",
        ),
        ('[[target]]\nrepo = "a/b"\nrecipe = "wint2"\ntp = 3', "[[target]] 1: tp is 3"),
        ('[[target]]\nrepo = "a/b"\nrecipe = "wint2"\ntp = true', "[[target]] 1: tp is True, not a whole number"),
        (
            '[[target]]\nrepo = "a/b"\nrecipe = "wint4"\nscale = "best"',
            "codec rtn: scale is 'best', not mse or absmax",
        ),
        ('[[target]]\nrepo = "a/b"\nrecipe = "pt"\nrevision = "a b"', "[[target]] 1: revision 'a b' is no name of a branch"),
        ("[limits]\nmax_hours = nan", "[limits]: max_hours is nan, not a number above 0"),
        ('[limits]\ndisk_budget = "1e999GB"', "[limits]: disk_budget: '1e999GB' is not a size"),
        ("limits = 5", "[limits]: is not a table"),
        ("[source", "is not valid TOML"),
    ],
)
def test_mistakes_are_named(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in mistake for mistake in mistakes(tmp_path, text))


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        read_job(tmp_path / "none.toml")


OPTIONS = {
    "pt": "",
    "paddle": "",
    "wint4": 'group_size = "channel"\nscale = "absmax"\nmtp = true\nkeep_unfit = true\nruntime = "transformers"',
    "wint8": "group_size = 64",
    "fp8": "experts_only = true",
    "wint2": 'wint4_layers = 0\neffort = 1\nscale = "absmax"\ntp = 2',
}


@pytest.mark.parametrize("name", KINDS)
def test_every_recipe_can_be_asked_for_with_its_options(name: str, tmp_path: Path) -> None:
    target = f'[[target]]\nrepo = "me/tiny"\nrecipe = "{name}"\n{OPTIONS[name]}\n'
    (found,) = read_job(job_file(tmp_path, target)).targets
    assert (found.scheme, found.repo, found.private, found.tag) == ("hf", "me/tiny", None, False)
    assert found.runtime == {"paddle": "fastdeploy", "wint2": "fastdeploy", "wint4": "transformers"}.get(name, "vllm")
    assert found.recipe.name == {"pt": "keep", "paddle": "keep"}.get(name, name)
    codecs = [rule.codec.describe() for rule in found.recipe.rules]
    assert codecs[0:1] == {
        "wint4": ["int4, per channel, absmax"],
        "wint8": ["int8, group 64, mse"],
        "fp8": ["fp8, blocks 128x128"],
        "wint2": ["wint2 (CCQ), effort 1"],
    }.get(name, [])


def test_all_the_rest_of_a_job_file(tmp_path: Path) -> None:
    rules = '[[target.rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 4\n[[target.rule]]\nmatch = "mlp"\ncodec = "fp8"\n'
    target = f'[[target]]\nrepo = "hf://me/tiny"\nrevision = "next"\nprivate = false\ntag = true\nkeep_unfit = true\n{rules}'
    container = '[[target]]\nrepo = "me/fd"\nrecipe = "wint4"\nruntime = "fastdeploy"\ntp = 4\nmax_shard_size = "2GiB"\n'
    more = '[limits]\ndisk_budget = "60GB"\nmax_hours = 7.5\n'
    job = read_job(job_file(tmp_path, target, container, source=f'{ADDRESS}"\nrevision = "v1', more=more))
    first, second = job.targets
    assert (job.source, job.disk_budget, job.max_hours) == (f"{ADDRESS}@v1", 60 * 10**9, 7.5)
    assert (first.revision, first.private, first.tag, first.recipe.keep_unfit) == ("next", False, True, True)
    assert first.folder.endswith("me--tiny@next")
    assert [r.codec.describe() for r in first.recipe.rules] == ["int4, group 128, mse", "fp8, blocks 128x128"]
    assert (second.runtime, second.tp, second.shard_bytes) == ("fastdeploy", 4, 2 << 30)
    assert read_job(job_file(tmp_path, PT)) == Job(ADDRESS, read_job(job_file(tmp_path, PT)).targets, None, None)


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    from ernie_quant.nightly import job

    assert job.__doc__
    text = job.__doc__.partition("\n\n")[2]
    assert tomllib.loads(text)
    (tmp_path / "job.toml").write_text(text)
    assert read_job(tmp_path / "job.toml").targets[0].recipe.name == "wint4"


def test_check_only_looks(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    hub.requests.clear()
    path = job_file(tmp_path, WINT4, PT)
    assert command("nightly", path, "--check", "--work", tmp_path / "work") == (0, f"{path}: 2 target(s), no mistakes\n", "")
    path.write_text("[source]")
    code, _, err = command("nightly", path, "--check")
    assert (code, len(err.splitlines())) == (1, 3)
    assert hub.requests == []
    assert not (tmp_path / "work").exists()


# --- nights ----------------------------------------------------------------------------------------------------------


class Night:
    """Runs a job in a work folder; `events` are those of the last night."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.events: list[dict[str, Any]] = []

    def __call__(self, *targets: str, source: object = ADDRESS, more: str = "", **options: Any) -> JobResult:
        self.events = []
        path = job_file(self.folder, *targets, source=source, more=more)
        return run_job(read_job(path), self.work, log=lambda **e: self.events.append(e), **options)

    def place(self, target: str) -> Path:
        """The folder in which it is made."""
        return self.work / read_job(job_file(self.folder, target)).targets[0].folder

    @property
    def left(self) -> set[str]:
        return {p.name for p in self.work.iterdir()} - {"lock", "log.jsonl"}


@pytest.fixture
def night(hub: LoopbackHub, tmp_path: Path, waits: list[float]) -> Night:
    return Night(tmp_path)


def manifest(hub: LoopbackHub, repo: str) -> dict[str, Any]:
    return dict(json.loads(hub.repo(repo).read("ernie-quant.json")))


def statuses(result: JobResult) -> list[str]:
    return [target.status for target in result.targets]


def test_the_first_night_publishes_and_the_second_does_nothing(hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    first = night(WINT4, PT)
    assert (first.status, first.exit_code, statuses(first)) == ("published", 0, ["published", "published"])
    assert first.source_commit == hub.repo(NAME).branches["main"] == manifest(hub, "me/tiny-wint4")["source"]["revision"]
    assert [hub.repo(t.repo).branches["main"] for t in first.targets] == [t.commit for t in first.targets]
    assert hub.repo("me/tiny-wint4").private
    assert (night.left, files_of(tmp_path / "cache")) == (set(), [])

    hub.requests.clear()
    second = night(WINT4, PT)
    assert (second.status, second.exit_code, statuses(second)) == ("up-to-date", 0, ["up-to-date", "up-to-date"])
    assert [t.commit for t in second.targets] == [t.commit for t in first.targets]
    assert writes(hub) == []
    assert weights_asked(hub) == []
    assert night.left == set()


def test_the_command_says_so_and_its_log_is_json_lines(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    path, work = job_file(tmp_path, WINT4), tmp_path / "work"
    code, out, err = command("nightly", path, "--work", work)
    commit, made = hub.repo("me/tiny-wint4").branches["main"], manifest(hub, "me/tiny-wint4")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"published: {ADDRESS} at {hub.repo(NAME).branches['main'][:12]}"
    assert out.splitlines()[1].startswith("  published: me/tiny-wint4: 0.00 GB, relative error 0.0")
    assert out.endswith(f"commit {commit[:12]}\n")

    code, out, _ = command("nightly", path, "--work", work, "--json")
    found = json.loads(out)
    assert (code, found["status"], found["targets"][0]["commit"]) == (0, "up-to-date", commit)
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert events == ["source", "target", "made", "verified", "result", "end", "source", "target", "result", "end"]
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert lines[2]["bytes"] == made["summary"]["bytes_out"]
    assert (lines[4]["status"], lines[4]["commit"]) == ("published", commit)

    other = tmp_path / "other.jsonl"
    command("nightly", path, "--work", work, "--log", other)
    assert len(other.read_text().splitlines()) == 4


def test_a_new_revision_of_the_source_is_published(hub: LoopbackHub, night: Night) -> None:
    before = night(WINT4).targets[0].commit
    new = hub.put(NAME, {"generation_config.json": b'{"top_k": 1}'})
    result = night(WINT4)
    assert (result.status, result.source_commit) == ("published", new)
    assert [c.id for c in hub.repo("me/tiny-wint4").commits()][1] == before
    assert hub.repo("me/tiny-wint4").read("generation_config.json") == b'{"top_k": 1}'
    assert night(WINT4).status == "up-to-date"


def test_other_options_are_another_result(hub: LoopbackHub, night: Night) -> None:
    night(WINT4)
    assert night(WINT4 + "experts_only = true\n").status == "published"
    assert night(WINT4 + "experts_only = true\n").status == "up-to-date"


def test_what_was_begun_for_an_older_revision_is_begun_anew(hub: LoopbackHub, night: Night) -> None:
    fault = hub.fail(path="^/lfs/.*-00004-of", status=503, times=0)
    open_source(ADDRESS)
    fault.times = None
    first = night(WINT4)
    assert (first.status, first.exit_code) == ("retry", 75)
    assert "tried 8 times" in first.targets[0].error
    assert list((night.place(WINT4)).glob("model-00001-of-*.safetensors"))
    fault.times = 0
    new = hub.put(NAME, {"generation_config.json": b"{}"})
    assert night(WINT4).status == "published"
    assert "restart" in [e["event"] for e in night.events]
    assert manifest(hub, "me/tiny-wint4")["source"]["revision"] == new
    assert night.left == set()


def test_a_night_that_was_cut_short_goes_on(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps once two files are there."""
    files = night.place(WINT4)
    clock = SimpleNamespace(monotonic=lambda: 1e6 if len(list(files.glob("*.safetensors"))) == 2 else 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(nightly, "time", clock)
        first = night(WINT4, PT, more="[limits]\nmax_hours = 1\n")
    assert (first.exit_code, statuses(first)) == (75, ["retry", "retry"])
    assert first.targets[0].error == "max_hours have passed; the next run goes on where this one stopped"
    second = night(WINT4, PT)
    assert statuses(second) == ["published", "published"]
    assert next(e for e in night.events if e["event"] == "made")["files_before"] == 2


def test_no_time_at_all(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    code, out, err = command("nightly", job_file(tmp_path, WINT4), "--work", tmp_path / "work", "--max-hours", "1e-9")
    assert (code, err) == (75, "")
    assert "  retry: me/tiny-wint4: max_hours have passed" in out
    assert "me/tiny-wint4" not in hub.store.repos


def test_time_may_end_while_files_are_uploaded(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []
    real = HuggingFacePublisher.upload

    def upload(self: HuggingFacePublisher, repo: str, revision: str, file: Any) -> bool:
        uploaded.append(file.name)
        return real(self, repo, revision, file)

    monkeypatch.setattr(HuggingFacePublisher, "upload", upload)
    with monkeypatch.context() as patch:
        patch.setattr(nightly, "time", SimpleNamespace(monotonic=lambda: 1e6 if len(uploaded) == 3 else 0.0))
        assert night(WINT4, max_hours=1).status == "retry"
    assert len(uploaded) == 3
    assert night(WINT4).status == "published"


def test_one_target_that_fails_does_not_stop_the_others(hub: LoopbackHub, night: Night) -> None:
    hub.put("them/theirs", {"model.safetensors": b"\0" * 100})
    theirs = '[[target]]\nrepo = "them/theirs"\nrecipe = "pt"\n'
    fault = hub.fail(path="me/busy/commit/", status=503, times=None)
    busy = '[[target]]\nrepo = "me/busy"\nrecipe = "pt"\n'
    first = night(busy, PT)
    assert (first.status, first.exit_code, statuses(first)) == ("retry", 75, ["retry", "published"])
    second = night(theirs, busy, PT, WINT4)
    assert (second.status, second.exit_code) == ("failed", 1)
    assert statuses(second) == ["failed", "retry", "up-to-date", "published"]
    assert "was not made by ernie-quant" in second.targets[0].error
    fault.times = 0
    third = night(busy, PT)
    assert statuses(third) == ["published", "up-to-date"]
    made = next(e for e in night.events if e["event"] == "result")
    assert made["bytes"] > 0


def test_the_summary_has_a_line_for_each_target(hub: LoopbackHub, night: Night) -> None:
    hub.put("them/theirs", {"model.safetensors": b"\0" * 100})
    result = night('[[target]]\nrepo = "them/theirs"\nrecipe = "pt"\n', WINT4)
    job, theirs, ours = summary(result).splitlines()
    assert job == f"failed: {ADDRESS} at {hub.repo(NAME).branches['main'][:12]}"
    assert theirs.startswith("  failed: them/theirs: them/theirs: holds model.safetensors and was not made by ernie-quant")
    error = result.targets[1].rel_error
    assert 0.001 < error < 0.1
    commit = hub.repo("me/tiny-wint4").branches["main"][:12]
    assert ours == f"  published: me/tiny-wint4: 0.00 GB, relative error {error:.3g}, commit {commit}"


def test_the_error_of_a_result_that_was_finished_before_is_known(hub: LoopbackHub, night: Night) -> None:
    fault = hub.fail(path="/commit/", status=503, times=None)
    assert night(WINT4).status == "retry"
    fault.times = 0
    hub.requests.clear()
    assert night(WINT4).targets[0].rel_error > 0.001
    assert weights_asked(hub) == []  # finished, only not published


def test_a_full_disk_stops_one_target_only(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nightly.run_plan

    def run(plan: Any, out: Path, **options: Any) -> Any:
        if "wint4" in out.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(out / "model.safetensors.partial"))
        return real(plan, out, **options)

    monkeypatch.setattr(nightly, "run_plan", run)
    result = night(WINT4, PT)
    assert (result.exit_code, statuses(result)) == (75, ["retry", "published"])
    assert result.targets[0].error.endswith("model.safetensors.partial: No space left on device")


def test_what_no_target_can_be_made_of_is_refused_before_any_work(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """Groups of 128 do not fit a model whose experts are 32 wide."""
    unfit = '[[target]]\nrepo = "me/unfit"\nrecipe = "wint4"\n'
    code, out, err = command("nightly", job_file(tmp_path, PT, unfit), "--work", tmp_path / "work")
    assert (code, out) == (1, "")
    assert "group" in err
    budget = '[limits]\ndisk_budget = "300kB"\n'
    code, out, err = command("nightly", job_file(tmp_path, WINT4, PT, more=budget), "--work", tmp_path / "other")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "354952 bytes (0.00 GB) of it are needed at once, more than the disk budget of 300000 bytes" in err
    assert weights_asked(hub)
    assert all(asked for _, asked in weights_asked(hub))  # ranges only
    assert set(hub.store.repos) == {NAME}
    (line,) = (tmp_path / "work/log.jsonl").read_text().splitlines()[1:]
    assert (json.loads(line)["event"], json.loads(line)["exit_code"]) == ("error", 1)


def test_a_source_that_cannot_be_reached_is_worth_retrying(
    hub: LoopbackHub, command: Command, tmp_path: Path, waits: list[float]
) -> None:
    fault = hub.fail(path="^/api/models/baidu", status=503, times=None)
    code, _, err = command("nightly", job_file(tmp_path, PT), "--work", tmp_path / "work")
    assert (code, err.count("\n"), fault.struck) == (75, 1, 8)


# --- missed, doubled, killed -----------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_waits_for_another_night(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    hub.requests.clear()
    with hold(work / "lock", "busy"):
        code, out, err = command("nightly", job_file(tmp_path, WINT4), "--work", work)
    assert (code, out) == (75, "")
    assert err == f"error: {work}: another run of a job is at work here\n"
    assert hub.requests == []
    with pytest.raises(RetryError, match="busy"), hold(work / "lock", "busy"), hold(work / "lock", "busy"):
        pass


def test_a_doubled_run_elsewhere_is_harmless(
    hub: LoopbackHub, night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine with the same job publishes while this one uploads."""
    real = HuggingFacePublisher.commit
    elsewhere = Night(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    results: list[JobResult] = []

    def commit(self: HuggingFacePublisher, *arguments: Any) -> str:
        monkeypatch.setattr(HuggingFacePublisher, "commit", real)
        monkeypatch.setenv("ERNIE_QUANT_CACHE", str(tmp_path / "elsewhere/cache"))
        results.append(elsewhere(WINT4))
        return real(self, *arguments)

    monkeypatch.setattr(HuggingFacePublisher, "commit", commit)
    result = night(WINT4)
    assert result.exit_code == results[0].exit_code == 0
    assert result.targets[0].commit == results[0].targets[0].commit
    assert len(hub.repo("me/tiny-wint4").commits()) == 2
    assert night.left == elsewhere.left == set()


def test_what_a_killed_run_was_deleting_is_deleted(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published, and killed in the middle of the deletion; the source moves on before the next night."""

    class Killed(BaseException):
        pass

    def rmtree(folder: Path, **options: Any) -> None:
        if folder.name == nightly.DROPPED and folder.exists():
            next(folder.rglob("*.json")).unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(nightly.shutil, "rmtree", rmtree)
        with pytest.raises(Killed):
            night(WINT4)
    assert night.left == {nightly.DROPPED}
    hub.put(NAME, {"generation_config.json": b"{}"})
    assert night(WINT4).status == "published"
    assert night.left == set()


@pytest.mark.parametrize("name", ["README.md", "report.html", "SHA256SUMS", "ernie-quant.json"])
def test_a_run_that_was_killed_while_it_wrote_the_card_goes_on(
    name: str, hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publishing.write_file

    class Killed(BaseException):
        pass

    def write_file(path: Path, data: bytes) -> str:
        if path.name == name:
            path.with_name(f"{name}.partial").write_bytes(data[:100])
            raise Killed
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_file", write_file)
        with pytest.raises(Killed):
            night(WINT4)
    hub.requests.clear()
    assert night(WINT4).status == "published"
    assert weights_asked(hub) == []
    assert not [n for n in hub.repo("me/tiny-wint4").files() if n.endswith(".partial")]
    assert night.left == set()


def test_a_commit_without_its_tag_gets_it_the_next_night(hub: LoopbackHub, night: Night) -> None:
    fault = hub.fail(method="POST", path="/tag/", status=503, times=None)
    assert night(WINT4 + "tag = true\n").status == "retry"
    commit = hub.repo("me/tiny-wint4").branches["main"]
    fault.times = 0
    result = night(WINT4 + "tag = true\n")
    assert (result.status, result.targets[0].commit) == ("up-to-date", commit)
    made = manifest(hub, "me/tiny-wint4")
    assert hub.repo("me/tiny-wint4").tags == {f"{made['source']['revision'][:12]}-{made['fingerprint'][:12]}": commit}
    hub.requests.clear()
    night(WINT4 + "tag = true\n")
    assert writes(hub) == []


@pytest.mark.parametrize("damage", ["another file", "a missing file", "no manifest"])
def test_what_somebody_damaged_is_made_again(damage: str, hub: LoopbackHub, night: Night) -> None:
    night(WINT4 + "tag = true\n")
    repo = hub.repo("me/tiny-wint4")
    wanted = {n: f.sha256 for n, f in repo.files().items()}
    shard = next(name for name in wanted if name.endswith(".safetensors"))
    hub.put(
        "me/tiny-wint4",
        {
            "another file": {shard: b"\0" * repo.files()[shard].size},
            "a missing file": {shard: None},
            "no manifest": dict.fromkeys(wanted.keys() - {"README.md", ".gitattributes"}),
        }[damage],
    )
    found = night(WINT4 + "tag = true\n")
    assert found.status == "published"
    assert {n: f.sha256 for n, f in repo.files().items()} == wanted
    assert len(repo.tags) == 1
    assert night(WINT4 + "tag = true\n").status == "up-to-date"


@pytest.mark.parametrize("odd", [b"[]", b"{", b'{"files": 5}', b'{"fingerprint": "x", "files": {"a": 1}}', b"\xff"])
def test_an_odd_manifest_on_the_hub_is_no_crash(odd: bytes, hub: LoopbackHub, night: Night) -> None:
    hub.put("me/tiny-wint4", {"ernie-quant.json": odd, "model.safetensors": b"\0" * 100})
    assert night(WINT4).exit_code in (0, 1)


def test_a_public_target_is_public_and_a_private_one_stays_so(hub: LoopbackHub, night: Night) -> None:
    assert night(WINT4 + "private = false\n").exit_code == 0
    assert not hub.repo("me/tiny-wint4").private
    hub.repo("me/tiny-wint4").private = True
    hub.put(NAME, {"generation_config.json": b"{}"})
    result = night(WINT4 + "private = false\n")
    assert (result.exit_code, hub.repo("me/tiny-wint4").private) == (1, True)
    assert "is private, and --public was asked for" in result.targets[0].error


def test_a_folder_can_be_the_source(hub: LoopbackHub, night: Night) -> None:
    assert night(WINT4 + "tag = true\n", source=SOURCE).status == "published"
    assert night(WINT4 + "tag = true\n", source=SOURCE).status == "up-to-date"
    assert next(iter(hub.repo("me/tiny-wint4").tags)).startswith("local-")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_killed_nights_end_as_an_unbroken_one(tmp_path: Path) -> None:
    """The long version: `python tests/faults/nightly.py --kills 50`."""
    from faults.nightly import all_trials

    tally = all_trials(tmp_path, kills=2, seed=4)
    assert tally.failures == []
    assert tally.kills >= 2


# --- from the source to a model that runs ----------------------------------------------------------------------------


RUNNABLE = OF_128S | {"vocab_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "moe_k": 1}


def test_from_the_hub_to_a_model_that_computes(hub: LoopbackHub, night: Night, tmp_path: Path, command: Command) -> None:
    from huggingface_hub import snapshot_download

    source = random_model(tmp_path / "src", "paddle", **RUNNABLE)
    hub.put("baidu/random", source)
    wint4 = '[[target]]\nrepo = "me/random-wint4"\nrecipe = "wint4"\nmax_shard_size = "100kB"\n'
    wint2 = '[[target]]\nrepo = "me/random-wint2"\nrecipe = "wint2"\nwint4_layers = 1\neffort = 1\n'
    shared = '[[target]]\nrepo = "me/random-tp2"\nrecipe = "wint2"\nwint4_layers = 1\neffort = 1\ntp = 2\n'
    result = night(wint4, wint2, shared, source="hf://baidu/random")
    assert statuses(result) == ["published"] * 3
    there = {t.repo: Path(snapshot_download(t.repo, local_dir=tmp_path / t.repo)) for t in result.targets}
    for folder in there.values():
        shutil.rmtree(folder / ".cache")
        assert verify(folder, against="hf://baidu/random").sampled > 10
    assert {p.name for p in there["me/random-tp2"].iterdir()} >= {"rank0", "rank1"}

    command("wint4", source, tmp_path / "local", "--max-shard-size", "100kB", "-q")
    found, wanted = contents(there["me/random-wint4"]), contents(tmp_path / "local")
    assert {n for n in wanted if found[n] != wanted[n]} == {"README.md", "SHA256SUMS", "ernie-quant.json"}
    computed = logits(there["me/random-wint4"], torch.bfloat16)
    assert torch.equal(computed, logits(tmp_path / "local", torch.bfloat16))
    original = logits(source_as_pt(source, tmp_path, command), torch.bfloat16)
    assert 0 < (computed - original).square().sum() / original.square().sum() < 0.2


def source_as_pt(source: Path, tmp_path: Path, command: Command) -> Path:
    assert command("convert", source, tmp_path / "plain", "--to", "pt", "-q")[0] == 0
    return tmp_path / "plain"
