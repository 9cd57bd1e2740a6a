"""The nightly job: what is published, what is left, and what a failure of one target means for the others."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import Command
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, NAME, files_of, uploads, weights_asked, writes
from helpers.models import copy, logits, random_model
from helpers.nights import PT, WINT4, Night, job_file, manifest, statuses
from helpers.runs import OF_128S, SOURCE

from ernie_quant.check.verify import verify
from ernie_quant.hubs.hf.publish import HuggingFacePublisher
from ernie_quant.nightly import run as nightly
from ernie_quant.nightly.outcome import summary
from ernie_quant.sources import open_source

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures")]


# --- nights ----------------------------------------------------------------------------------------------------------


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


def test_a_target_says_what_is_carried_along_too(hub: LoopbackHub, night: Night) -> None:
    hub.put(NAME, {"figures/a.png": b"png", "train.log": b"x"})
    assert statuses(night(f'{PT}copy = ["figures/*"]\n', WINT4)) == ["published", "published"]
    assert hub.repo("me/tiny-pt").read("figures/a.png") == b"png"
    assert "figures/a.png" not in manifest(hub, "me/tiny-wint4")["files"]
    assert "not carried along: train.log; --copy PATTERN takes them" in manifest(hub, "me/tiny-pt")["summary"]["notes"]
    assert statuses(night(f'{PT}copy = ["figures/*"]\n', WINT4)) == ["up-to-date", "up-to-date"]
    assert statuses(night(PT, WINT4)) == ["published", "up-to-date"]
    assert "figures/a.png" not in manifest(hub, "me/tiny-pt")["files"]


def test_what_lies_beside_the_weights_of_a_folder_makes_no_new_result(hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    source = copy(SOURCE, tmp_path / "src")
    assert statuses(night(PT, source=source)) == ["published"]
    (source / "nightly.log").write_text("x")
    (source / "tokenizer_config.json").write_text("{}")
    assert statuses(night(PT, source=source)) == ["up-to-date"]


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
    lines = [line for line in lines if line["event"] != "file"]
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
