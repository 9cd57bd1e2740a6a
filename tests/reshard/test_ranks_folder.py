"""Folders of ranks: what lies in them, what verify finds, and what is left of other runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Command
from helpers.disk import contents
from helpers.models import config, copy, invoke, same, tensors
from helpers.ranks import FORMS, MAKE, WINT2_DOWN, lasting, reshard
from helpers.results import first_byte, poke, sealed
from helpers.runs import Killed
from safetensors.torch import save_file

from ernie_quant.check.verify import verify
from ernie_quant.errors import CheckpointError, VerifyError
from ernie_quant.planning.built_in import make
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.reshard import make_reshard_plan
from ernie_quant.run import whole
from ernie_quant.run.shared import run_shared
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@FORMS
def test_config_lies_in_the_root_and_beside_the_mtp_ranks(form: str, size: int, folder: Path) -> None:
    out = folder / form / str(size)
    assert sorted(p.parent.relative_to(out).as_posix() for p in out.rglob("config.json")) == [".", "mtp"]
    said = {} if size == 1 else {"tensor_parallel_size": size}
    plain = {k: v for k, v in config(folder / form / "1").items() if k != "tensor_parallel_size"}
    assert config(out) == config(out / "mtp") == plain | said
    ranks = [f"rank{i}" for i in range(size)] if size > 1 else []  # never a lone rank0
    for place in (out, out / "mtp"):
        assert sorted(p.name for p in place.glob("rank*")) == ranks
        assert bool(list(place.glob("*.safetensors"))) == (size == 1)
    assert (out / "tokenizer.model").read_bytes() == b"tokens"


def test_the_readme_runs_the_right_number_of_ranks(folder: Path) -> None:
    text = (folder / "wint2/tp2/README.md").read_text()
    assert "FD_USE_MACHETE=0 python -m fastdeploy" in text
    assert "--tensor-parallel-size 2 " in text
    assert "FD_USE_MACHETE=0 is needed" in text  # the note of the first run
    assert "widths, heads and groups allow: 1, 2, 4." in text


def test_small_files_have_an_index_in_every_rank(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("reshard", folder / "wint2/1", out, "--tp", 2, "--max-shard-size", "300KB", "--quiet")
    for place in (out / "rank0", out / "rank1", out / "mtp/rank0", out / "mtp/rank1"):
        index = json.loads((place / "model.safetensors.index.json").read_text())
        files = sorted(p.name for p in place.glob("*.safetensors"))
        assert len(files) > 1
        assert sorted(set(index["weight_map"].values())) == files
        assert index["weight_map"].keys() == tensors(place).keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(place).values())
        where = {(name.rpartition(".")[0], file) for name, file in index["weight_map"].items()}
        assert len(where) == len({layer for layer, _ in where})  # a weight and its scales lie in one file
    assert same(tensors(out / "rank1"), tensors(folder / "wint2/2/rank1")) == []
    verify(out, folder / "src")
    assert lasting(reshard(out, tmp_path / "back", 1)) == lasting(folder / "wint2/1")


def test_nothing_is_left_beside_out_and_a_second_run_says_complete(folder: Path, command: Command, tmp_path: Path) -> None:
    name, *options = MAKE["wint2"]
    arguments = (name, folder / "src", tmp_path / "out", *options, "--tp", 2)
    assert command(*arguments)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/.ernie-quant").exists()
    before = contents(tmp_path / "out")
    assert command(*arguments) == (0, f"{tmp_path / 'out'}: complete\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == before
    code, _, err = command(*arguments[:-1], 4)  # another size is another plan
    assert (code, "holds the result of another plan" in err) == (1, True)
    assert contents(tmp_path / "out") == before


def test_a_second_reshard_says_complete(folder: Path, command: Command, tmp_path: Path) -> None:
    arguments = ("reshard", folder / "wint4/1", tmp_path / "out", "--tp", 2)
    assert command(*arguments)[0] == 0
    assert command(*arguments) == (0, f"{tmp_path / 'out'}: complete\n", "")


@pytest.mark.parametrize("calls", [1, 3, 5], ids=["while quantizing", "at the first rank", "at the last rank"])
def test_a_killed_run_with_tp_goes_on(calls: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files are quantized (model and MTP block), then four are shared out."""
    plan = make_plan(open_source(folder / "src"), runtime="fastdeploy", recipe=make("wint2", wint4_layers=2, effort=1).recipe)
    original, done = whole.run_shard, []

    def run_shard(job: Any, **how: Any) -> Any:
        if len(done) == calls:
            raise Killed
        done.append(job.shard.filename)
        return original(job, **how)

    out = tmp_path / "wint2/tp2"
    out.parent.mkdir()
    options: dict[str, Any] = {"workers": 2, "restart": False, "progress": lambda _: None}
    with monkeypatch.context() as patched:
        patched.setattr(whole, "run_shard", run_shard)
        with pytest.raises(Killed):
            run_shared(plan, out, 2, **options)
    assert not (out / "ernie-quant.json").exists()
    calls, first = 100, list(done)
    monkeypatch.setattr(whole, "run_shard", run_shard)
    run_shared(plan, out, 2, **options)
    assert len(done) == len(set(done)) == 6, first  # nothing was written twice
    assert contents(out) == contents(folder / "wint2/tp2")
    assert [p.name for p in out.parent.iterdir()] == ["tp2"]


def test_a_published_checkpoint_is_resharded_and_verified(folder: Path, tmp_path: Path) -> None:
    """It has no manifest and no report; here with the ranks of 2 GPUs."""
    published = copy(folder / "wint2/2", tmp_path / "published")
    for name in ("report.json", "ernie-quant.json", "README.md"):
        (published / name).unlink()
    for tp, like in ((1, "1"), (4, "4")):
        out = tmp_path / like
        invoke("reshard", published, out, "--tp", tp, "--quiet")
        assert lasting(out) == {name: data for name, data in lasting(folder / "wint2" / like).items() if name != "report.json"}
        assert verify(out).quantized == verify(folder / "wint2" / like).quantized
        assert verify(out, folder / "src").against


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["2", "4", "tp2"])
@FORMS
def test_ranks_are_verified(form: str, size: str, folder: Path) -> None:
    found, whole = verify(folder / form / size), verify(folder / form / "1")
    assert (found.tensors, found.quantized) == (whole.tensors, whole.quantized)
    # attention and MLP of 3 layers and the MTP block, 2 x 2 experts and 2 times shared ones of two linears each
    assert found.quantized == 4 * 2 + 2 * 2 + (4 + 2) * 2
    assert verify(folder / form / size, folder / "src").against


@pytest.mark.parametrize("place", ["rank0", "rank1", "mtp/rank1"])
def test_one_changed_byte_of_one_rank_is_found(place: str, folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "wint2/2", tmp_path / "out")
    name = next(n for n in sorted(tensors(out / place)) if n.endswith("down_proj.quant_weight"))
    poke(out / place, name, bytes([first_byte(out / place, name) ^ 1]))
    with pytest.raises(VerifyError) as error:
        verify(out)
    file, weight = error.value.problems
    assert file.startswith(f"{place}/model.safetensors: its sha256 is ")
    assert weight.startswith(name.replace("quant_weight", "weight: its stored bytes are not those that were written"))
    sealed(out)
    verify(out)  # nothing but the source can tell
    with pytest.raises(VerifyError) as error:
        verify(out, folder / "src")
    (line,) = error.value.problems
    assert re.match(re.escape(name.replace("quant_weight", "weight")) + r": its (relative|squared) error is ", line)


def test_a_rank_that_lacks_a_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    out, name = copy(folder / "wint2/2", tmp_path / "out"), f"{WINT2_DOWN}.super_scales"
    save_file({n: t for n, t in tensors(out / "rank1").items() if n != name}, out / "rank1/model.safetensors")
    with pytest.raises(VerifyError) as error:
        verify(sealed(out))
    assert f"{name}: is in 1 of 2 ranks" in error.value.problems


# --- what is left of other runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 1])
def test_restart_leaves_no_rank_folders_of_another_size(tp: int, folder: Path, tmp_path: Path) -> None:
    """FastDeploy would read them first."""
    out = reshard(folder / "wint4/1", tmp_path / "out", 4)
    run_plan(make_reshard_plan(open_source(folder / "wint4/1"), tp), out, restart=True)
    assert lasting(out) == lasting(folder / "wint4" / ("2" if tp == 2 else "1"))
    assert sorted(p.name for p in out.rglob("rank*")) == (sorted(2 * ["rank0", "rank1"]) if tp == 2 else [])


def test_a_rank_folder_that_the_manifest_does_not_know_is_found(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "wint4/2", tmp_path / "out")
    copy(out / "rank1", out / "rank2")
    with pytest.raises(VerifyError, match=r"rank2/model\.safetensors: is not in the manifest"):
        verify(out)


def test_kept_tensors_that_differ_between_ranks_are_found_without_the_source(folder: Path, tmp_path: Path) -> None:
    out = copy(folder / "wint4/2", tmp_path / "out")
    table = tensors(out / "rank1")
    table["ernie.norm.weight"] = table["ernie.norm.weight"] + 1
    save_file(table, out / "rank1/model.safetensors", metadata={"format": "np"})
    sealed(out)
    with pytest.raises(VerifyError, match=r"ernie\.norm\.weight: differs between rank0/.* and rank1/"):
        verify(out)


def test_tp_and_reshard_cut_the_same_files(folder: Path, tmp_path: Path) -> None:
    sizes = ("--max-shard-size", "1MB", "--quiet")
    invoke("wint4", folder / "src", tmp_path / "tp2", "--runtime", "fastdeploy", "--tp", 2, *sizes)
    invoke("reshard", folder / "wint4/1", tmp_path / "two", "--tp", 2, *sizes)
    assert lasting(tmp_path / "tp2") == lasting(tmp_path / "two")
    assert (tmp_path / "two/rank1/model.safetensors.index.json").exists()


def test_a_dry_run_refuses_a_size_that_does_not_fit(folder: Path, command: Command, tmp_path: Path) -> None:
    code, _, err = command("wint4", folder / "src", tmp_path / "out", "--runtime", "fastdeploy", "--tp", 16, "--dry-run")
    assert code == 1
    assert "cannot be shared by 16 ranks" in err


def test_bits_per_weight_count_weights_not_bytes(folder: Path) -> None:
    of = {size: re.search(r"([\d.]+) bits per weight", (folder / "wint4" / size / "README.md").read_text()) for size in "14"}
    assert of["1"]
    assert of["4"]
    assert float(of["1"][1]) <= float(of["4"][1]) < 1.1 * float(of["1"][1])  # norms, routers and row scales in every rank


def test_a_run_stopped_between_its_last_two_steps_leaves_nothing_in_the_end(folder: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", ("--runtime", "fastdeploy", "--tp", 2, "--quiet")
    invoke("wint4", folder / "src", out, *arguments)
    (out / ".ernie-quant").mkdir()
    copy(folder / "wint4/1", out / ".ernie-quant/unsplit")
    assert "complete" in invoke("wint4", folder / "src", out, *arguments)
    assert not (out / ".ernie-quant").exists()


def test_a_shared_result_names_the_source_and_not_what_was_made_in_between(folder: Path, tmp_path: Path) -> None:
    invoke("wint4", folder / "src", tmp_path / "out", "--runtime", "fastdeploy", "--tp", 2, "--quiet")
    found = json.loads((tmp_path / "out/ernie-quant.json").read_text())
    assert found["source_name"] == "src"
    assert {s for e in found["files"].values() for s in e.get("sources", ())} == {
        p.name for p in (folder / "src").glob("*.safetensors")
    }
    assert "src, quantized (wint4)" in (tmp_path / "out/README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_result_that_was_measured_does_not_pass_without_its_report(size: str, folder: Path, tmp_path: Path) -> None:
    """Quantized or resharded; only the ranks of files that others published have none, and their manifest says so."""
    out = copy(folder / "wint4" / size, tmp_path / "out")
    manifest = json.loads((out / "ernie-quant.json").read_text())
    del manifest["files"]["report.json"]
    (out / "ernie-quant.json").write_text(json.dumps(manifest))
    (out / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"report\.json: cannot be read"):
        verify(sealed(out))
