"""A result says what it was made from; a begun one goes on with that and with nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.disk import contents
from helpers.models import copy
from helpers.runs import SMALL, SOURCE, Killed, planned, stop_in_second_shard

from ernie_quant import codecs, plugins, version
from ernie_quant.codecs.rtn import CHANNEL, RoundToNearest
from ernie_quant.errors import CheckpointError, OutputError
from ernie_quant.planning import identity
from ernie_quant.planning.identity import changes
from ernie_quant.planning.recipe import Recipe, RecipeRule
from ernie_quant.run import whole
from ernie_quant.run.whole import run_plan
from ernie_quant.runtimes import vllm
from ernie_quant.sources import open_source
from ernie_quant.writers import safetensors

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy(SOURCE, tmp_path / "src")


def begun(source: Path, out: Path) -> Path:
    """A run that was killed in its second file."""
    plan = planned(source)
    with pytest.raises(Killed):
        run_plan(plan, out, progress=stop_in_second_shard(plan))
    return out


def refusal(source: Path, out: Path, **options: Any) -> str:
    """What is said to be different, in brackets."""
    before = contents(out)
    with pytest.raises(OutputError, match="choose another folder, or --restart to begin anew here") as error:
        run_plan(planned(source, **options), out)
    assert contents(out) == before
    found = re.search(r"\((.*)\)", str(error.value))
    assert found is not None
    return found[1]


# --- what is different, in words -------------------------------------------------------------------------------------


def test_differences_are_named_by_their_place_and_both_sides() -> None:
    before = {"recipe": {"rules": [{"codec": "int4"}, {"codec": "int8"}]}, "version": "1", "source": {"a": 1}}
    now = {"recipe": {"rules": [{"codec": "int4"}, {"codec": "fp8"}]}, "version": "2", "source": {"b": 1}}
    assert changes(before, now) == [
        "recipe rules 2 codec: is fp8, was int8",
        "version: is 2, was 1",
        "source b: is 1, was not there",
        "source a: was 1, is not there",
    ]
    assert changes(now, now) == []


def test_a_hundred_differences_are_four_and_a_number() -> None:
    lines = changes({}, {str(i): i for i in range(100)})
    assert lines == [*(f"{i}: is {i}, was not there" for i in range(4)), "and 96 more"]


def test_hashes_are_shown_by_their_beginning() -> None:
    assert changes({"header": "a" * 64}, {"header": "b" * 64}) == [f"header: is {'b' * 12}…, was {'a' * 12}…"]


# --- what a begun result depends on ----------------------------------------------------------------------------------


def test_another_recipe_is_named(source: Path, tmp_path: Path) -> None:
    rules = Recipe("test", (RecipeRule(RoundToNearest(4, CHANNEL)),))
    assert "recipe rules 1 codec: is int4, per channel, mse, was int4, group 32, mse" in refusal(
        source, begun(source, tmp_path / "out"), rules=rules
    )


def test_another_release_of_the_program_makes_nothing_old(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What it writes is the same as long as codecs, runtimes and formats say so."""
    out = begun(source, tmp_path / "out")
    monkeypatch.setattr(version, "__version__", "99.0")
    result = run_plan(planned(source), out)
    assert (result.files_before, result.complete_before) == (1, False)
    assert json.loads((out / "ernie-quant.json").read_text())["version"] == "99.0"
    monkeypatch.setattr(version, "__version__", "100.0")
    assert run_plan(planned(source), out).complete_before


@pytest.mark.parametrize(("module", "key"), [(vllm, "runtime"), (safetensors, "format")])
def test_another_version_of_a_runtime_or_a_format_is_named(
    module: Any, key: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    out, was = begun(source, tmp_path / "out"), module.VERSION
    monkeypatch.setattr(module, "VERSION", 7)
    assert refusal(source, out) == f"versions {key}: is 7, was {was}"


def test_another_version_of_a_codec_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = begun(source, tmp_path / "out")
    monkeypatch.setattr(RoundToNearest, "version", 7)
    assert refusal(source, out) == f"codecs rtn: is 7, was {plugins.load(codecs, 'rtn').EXAMPLES[0].version - 5}"


def test_another_torch_is_named_while_the_result_is_not_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun(source, tmp_path / "out")
    versions = identity.libraries()
    with monkeypatch.context() as patched:
        patched.setattr(identity.metadata, "version", lambda name: "99" if name == "torch" else versions[name])
        assert refusal(source, out) == f"libraries torch: is 99, was {versions['torch']}"
    run_plan(planned(source), out)
    monkeypatch.setattr(identity.metadata, "version", lambda name: "99")
    assert run_plan(planned(source), out).complete_before


def test_other_options_are_named(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "out")
    assert f"options max_shard_bytes: is {2 * SMALL}, was {SMALL}" in refusal(source, out, shard_bytes=2 * SMALL)


def test_a_changed_config_is_named_and_a_new_tokenizer_does_not_matter(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "out")
    (source / "tokenizer.json").write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    said = refusal(source, out)
    assert "tokenizer.json" not in said  # it has no part in the weights
    assert re.search(r"source config: is [0-9a-f]{12}…, was [0-9a-f]{12}…", said)


def test_a_source_that_was_written_to_is_named_though_sizes_and_headers_are_the_same(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "out")
    file = next(source.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    assert refusal(source, out).startswith(f"mtime_ns {file.name}: is 1, was ")


def test_a_clock_that_goes_backwards_changes_nothing(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "a/out")
    for path in out.rglob("*"):
        os.utime(path, (0, 0))
    result = run_plan(planned(source), out)
    assert result.files_before == 1
    run_plan(planned(source), tmp_path / "b/out")
    assert contents(out) == contents(tmp_path / "b/out")


def test_a_moved_source_is_the_same_source(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "out")
    source.rename(tmp_path / "elsewhere")
    assert run_plan(planned(tmp_path / "elsewhere"), out).files_before == 1


# --- revisions -------------------------------------------------------------------------------------------------------


def noted(folder: Path, commit: str, files: Callable[[str], bool] = lambda name: True) -> None:
    """What a download client leaves beside the files that it wrote."""
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True, exist_ok=True)
    for path in [p for p in folder.iterdir() if p.is_file() and files(p.name)]:
        (notes / f"{path.name}.metadata").write_text(f"{commit}\netag\n1763791234.5\n")


def test_the_commit_that_a_download_client_noted_is_the_revision(source: Path) -> None:
    noted(source, COMMIT)
    assert open_source(source).revision == COMMIT


def test_a_snapshot_folder_is_named_after_its_commit(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    assert open_source(snapshot).revision == COMMIT


@pytest.mark.parametrize("commit", ["main", "", COMMIT[:-1], "../../x", "0" * 41])
def test_what_is_no_commit_is_no_revision(source: Path, commit: str) -> None:
    noted(source, commit)
    assert open_source(source).revision == ""


def test_files_of_several_commits_have_no_revision(source: Path) -> None:
    noted(source, COMMIT)
    noted(source, OTHER, lambda name: name == "config.json")
    assert open_source(source).revision == ""


def test_another_revision_with_the_same_headers_is_another_source(source: Path, tmp_path: Path) -> None:
    noted(source, COMMIT)
    out = begun(source, tmp_path / "out")
    noted(source, OTHER)
    assert refusal(source, out) == f"source revision: is {OTHER}, was {COMMIT}"


# --- a source that changes while the run is at work ------------------------------------------------------------------


def changing(change: Callable[[], object]) -> Callable[[int], None]:
    """A progress callback that does it once."""
    left = [change]

    def progress(_: int) -> None:
        if left:
            left.pop()()

    return progress


@pytest.mark.parametrize("how", ["written", "longer", "gone"])
def test_a_source_that_changes_during_the_run_stops_it(source: Path, tmp_path: Path, how: str) -> None:
    file, out = next(source.glob("*.safetensors")), tmp_path / "out"

    def change() -> None:
        if how == "gone":
            file.unlink()
        else:
            with open(file, "r+b") as opened:
                opened.seek(-1 if how == "written" else 0, os.SEEK_END)
                opened.write(b"x")
            os.utime(file, ns=(1, 1))

    plan = planned(source)
    run_plan(plan, tmp_path / "before")
    what = {"written": "was written to", "longer": f"has {file.stat().st_size + 1} bytes, had {file.stat().st_size}"}
    with pytest.raises(CheckpointError) as error:
        run_plan(plan, out, progress=changing(change))
    line = str(error.value)
    assert line.startswith(f"{file}: ")
    assert ("No such file" if how == "gone" else f"has changed since the run began ({what[how]})") in line
    found = {p.name: p.read_bytes() for p in out.glob("model*")}
    assert len(found) < len(plan.shards)
    assert found.items() <= {p.name: p.read_bytes() for p in (tmp_path / "before").glob("model*")}.items()
    assert not (out / "ernie-quant.json").exists()


# --- what the manifest says ------------------------------------------------------------------------------------------


def test_the_manifest_says_what_every_file_was_made_from(source: Path, tmp_path: Path) -> None:
    noted(source, COMMIT)
    run_plan(planned(source), tmp_path / "out")
    found = json.loads((tmp_path / "out/ernie-quant.json").read_text())
    assert found["version"] == version.__version__
    assert found["libraries"].keys() == {"numba", "numpy", "torch"}
    assert found["source"]["revision"] == COMMIT
    assert found["codecs"] == {"rtn": 2}
    weights = {p.name for p in source.glob("*.safetensors")}
    for name, entry in found["files"].items():
        assert entry["bytes"] == (tmp_path / "out" / name).stat().st_size
        if name.endswith(".safetensors"):
            assert weights >= set(entry["sources"]) > set()
    assert "mtime" not in (tmp_path / "out/ernie-quant.json").read_text()


def test_sha256sum_agrees(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"tokens")
    run_plan(planned(source), tmp_path / "out")
    listed = {line.partition("  ")[2] for line in (tmp_path / "out/SHA256SUMS").read_text().splitlines()}
    assert listed == {p.name for p in (tmp_path / "out").iterdir()} - {"SHA256SUMS"}
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run([program, "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_recipes_that_differ_are_described_differently() -> None:
    """The identity holds descriptions: two codecs with one description would be taken for the same."""
    examples = [example for module in plugins.modules(codecs) for example in module.EXAMPLES]
    assert len({(codecs.name_of(e), e.describe()) for e in examples}) == len(examples)
    assert RoundToNearest(4, 64).describe() != replace(RoundToNearest(4, 64), full_range=False).describe()


# --- what is finished, by its hash -----------------------------------------------------------------------------------


def test_a_finished_file_with_one_changed_byte_is_written_again(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "a/out")
    file = out / planned(source).shards[0].filename
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run_plan(planned(source), out).files_before == 0
    run_plan(planned(source), tmp_path / "b/out")
    assert contents(out) == contents(tmp_path / "b/out")


def test_what_a_killed_run_left_half_written_is_swept(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "a/out")
    for name in ("model-00002-of-00009.safetensors.partial", "report.json.partial", ".ernie-quant/plan.json.partial"):
        (out / name).write_bytes(b"half")
    (out / "mine.txt").write_text("a user's own")
    run_plan(planned(source), out)
    assert not [p for p in out.rglob("*") if p.name.endswith(".partial")]
    assert (out / "mine.txt").exists()


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_complete_result_that_lost_a_file_is_not_called_complete(source: Path, tmp_path: Path, damage: str) -> None:
    plan, out = planned(source), tmp_path / "out"
    run_plan(plan, out)
    if damage == "gone":
        (out / plan.shards[1].filename).unlink()
    else:
        os.truncate(out / plan.shards[1].filename, 10)
    with pytest.raises(OutputError, match=f"{re.escape(plan.shards[1].filename)}: .*; --restart makes it again"):
        run_plan(plan, out)
    run_plan(plan, out, restart=True)
    assert run_plan(plan, out).complete_before


def test_a_run_that_was_killed_after_its_last_file_is_complete_and_swept(source: Path, tmp_path: Path) -> None:
    plan, out = planned(source), tmp_path / "out"
    run_plan(plan, out)
    (out / ".ernie-quant").mkdir()
    (out / ".ernie-quant/lock").touch()
    assert run_plan(plan, out).complete_before
    assert not (out / ".ernie-quant").exists()


def test_a_restart_that_is_killed_leaves_nothing_that_looks_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "tokenizer.model").write_bytes(b"tokens")
    old, out = planned(source, shard_bytes=2 * SMALL), tmp_path / "a/out"
    run_plan(old, out)
    new, unlink = planned(source), Path.unlink
    (source / "tokenizer.model").unlink()
    new = planned(source)

    def killed(path: Path, **options: bool) -> None:
        if path.name.startswith("model-00002"):
            raise Killed
        unlink(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            run_plan(new, out, restart=True)
    assert not (out / "ernie-quant.json").exists()
    run_plan(new, out)  # nothing of the old result is left that could mislead anybody
    run_plan(new, tmp_path / "b/out")
    assert contents(out) == contents(tmp_path / "b/out")


def test_the_shards_of_a_resumed_run_are_not_computed_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = begun(source, tmp_path / "out"), []
    original = whole.run_shard
    monkeypatch.setattr(whole, "run_shard", lambda job, **how: written.append(job.shard) or original(job, **how))
    result = run_plan(planned(source), out)
    assert [s.filename for s in written] == [s.filename for s in result.plan.shards[1:]]
    assert result.files_before == 1
