"""The functions of `import ernie_quant`: what they do is what the commands do."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import Command
from helpers.disk import contents
from helpers.models import GOLDEN, copy, random_model
from helpers.paths import ROOT

import ernie_quant
from ernie_quant import library
from ernie_quant.errors import OutputError, PlanError
from ernie_quant.run import memory
from ernie_quant.run.whole import FileDone

SOURCE = GOLDEN / "moe/paddle"
pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- the same as the commands ----------------------------------------------------------------------------------------


CALLS = {
    "convert": (("convert", "--to", "pt"), lambda out: ernie_quant.convert(SOURCE, out, to="pt")),
    "wint4": (
        ("wint4", "--experts-only", "--group-size", 32),
        lambda out: ernie_quant.quantize(SOURCE, out, "wint4", experts_only=True, group_size=32),
    ),
    "fp8": (("fp8", "--keep-unfit"), lambda out: ernie_quant.quantize(str(SOURCE), str(out), "fp8", keep_unfit=True)),
    "gguf": (
        ("gguf", "--type", "Q8_0", "--keep-unfit"),
        lambda out: ernie_quant.quantize(SOURCE, out, "gguf", type="Q8_0", keep_unfit=True),
    ),
    "small files": (
        ("wint8", "--group-size", 32, "--max-shard-size", "60kB"),
        lambda out: ernie_quant.quantize(SOURCE, out, "wint8", group_size=32, max_shard_size="60kB"),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_files_are_those_of_the_command(name: str, command: Command, tmp_path: Path) -> None:
    (verb, *options), call = CALLS[name]
    result = call(tmp_path / "out")
    assert result.status == "done"
    assert command(verb, SOURCE, tmp_path / "theirs/out", *options)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "theirs/out")
    assert call(tmp_path / "out").status == "complete"
    assert result.bytes_out == sum(row.bytes for row in result.tensors)


def test_ranks_and_back(command: Command, tmp_path: Path) -> None:
    source = random_model(
        tmp_path / "src", "paddle", "moe", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
        moe_num_experts=4,
    )  # fmt: skip
    two = ernie_quant.quantize(source, tmp_path / "two", "wint2", wint4_layers=2, effort=1, tp=2)
    assert (two.status, two.tp_sizes) == ("done", (1, 2))
    one = ernie_quant.reshard(tmp_path / "two", tmp_path / "one", tp=1)
    assert ernie_quant.verify(one.out, against=source).compared.total > 0
    plain = ernie_quant.dequantize(one.out, tmp_path / "plain", to="paddle")
    assert ernie_quant.inspect(plain.out).anomalies == ()


def test_a_recipe_is_a_file_too(tmp_path: Path) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text('[[rule]]\nrole = "experts"\ncodec = "rtn"\nbits = 4\ngroup_size = 32\n')
    result = ernie_quant.quantize(SOURCE, tmp_path / "out", rules)
    assert {row.role for row in result.tensors if row.changed} == {"experts"}
    assert result.command == "ernie-quant quantize paddle OUT --recipe mine.toml"
    with pytest.raises(ValueError, match=r"recipe mine: takes no option group_size"):
        ernie_quant.quantize(SOURCE, tmp_path / "other", rules, group_size=64)


def test_a_text_chooses_codes(tmp_path: Path) -> None:
    from helpers.calibrated import worded

    source = worded(tmp_path / "src")
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    planned = ernie_quant.quantize(
        source, tmp_path / "out", "wint4", group_size=32, keep_unfit=True, calibration=tmp_path / "book.txt",
        calibration_tokens=512, dry_run=True,
    )  # fmt: skip
    assert "--calibration book.txt --calibration-tokens 512 --method " in planned.command
    with pytest.raises(ValueError, match="method: of a calibration; name its text"):
        ernie_quant.quantize(source, tmp_path / "out", "wint4", method="feedback")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = ernie_quant.quantize(SOURCE, tmp_path / "out", "wint4", group_size=32, dry_run=True)
    assert (result.status, result.tensors, (tmp_path / "out").exists()) == ("planned", (), False)
    assert result.disk_bytes > result.bytes_out > 100_000
    assert {group["role"] for group in result.groups} >= {"experts", "norms"}


def test_progress_and_files_are_told(tmp_path: Path) -> None:
    told, files = [], []
    result = ernie_quant.convert(
        SOURCE, tmp_path / "out", to="pt", max_shard_size=60_000, progress=told.append, each=files.append, workers=1
    )  # fmt: skip
    assert sum(told) == result.bytes_in
    assert [file.number for file in files] == list(range(1, result.files + 1))
    assert all(isinstance(file, FileDone) for file in files)


def test_memory_goes_back_as_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "return_freed_memory", lambda: asked.append(1))
    ernie_quant.convert(SOURCE, tmp_path / "out", to="pt")
    ernie_quant.verify(tmp_path / "out")
    assert asked == [1, 1]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no option groupsize"):
        ernie_quant.quantize(SOURCE, tmp_path / "out", "wint4", groupsize=64)
    with pytest.raises(PlanError) as error:
        ernie_quant.quantize(SOURCE, tmp_path / "out", "wint4")
    assert isinstance(error.value, ernie_quant.ErnieQuantError)
    assert error.value.problems
    with pytest.raises(ValueError, match="to is 'gguf', not 'pt' or 'paddle'"):
        ernie_quant.convert(SOURCE, tmp_path / "out", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="was not made by ernie-quant"):
        ernie_quant.verify(copy(SOURCE, tmp_path / "theirs"))
    with pytest.raises(ValueError, match="is no size such as 80GiB and none of L4"):
        ernie_quant.plan(SOURCE, gpu_memory="H1000")
    with pytest.raises(ernie_quant.ErnieQuantError):
        ernie_quant.inspect("/nowhere")
    assert not (tmp_path / "out").exists()


# --- what a notebook shows -------------------------------------------------------------------------------------------


def test_everything_that_is_named_has_words_and_a_short_repr(tmp_path: Path) -> None:
    assert set(ernie_quant.__all__) <= set(dir(ernie_quant))
    functions = [getattr(ernie_quant, name) for name in ernie_quant.__all__ if name != "ErnieQuantError"]
    assert all(inspect.getdoc(function) and "Raises " in str(inspect.getdoc(function)) for function in functions)
    assert all(function.__module__ == library.__name__ for function in functions)
    out = tmp_path / "out"
    shown = [
        ernie_quant.inspect(SOURCE), ernie_quant.plan(SOURCE), ernie_quant.quantize(SOURCE, out, "wint4", group_size=32),
        ernie_quant.verify(out), ernie_quant.report(out),
    ]  # fmt: skip
    for value in shown:
        assert "\n" not in repr(value)
        assert len(repr(value)) < 1000, type(value)
    with pytest.raises(AttributeError, match="module 'ernie_quant' has no attribute 'quantise'"):
        ernie_quant.quantise  # noqa: B018


def test_the_names_stay_functions_whatever_was_imported() -> None:
    program = (
        "import ernie_quant, ernie_quant.planning.make, ernie_quant.reporting.page, ernie_quant.inspection, ernie_quant.cli.main;"
        "print(*(callable(getattr(ernie_quant, name)) for name in ernie_quant.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"True"}


def test_the_import_is_instant() -> None:
    program = "import sys; import ernie_quant; from ernie_quant import quantize; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "numpy", "numba", "safetensors", "huggingface_hub", "click", "tqdm"}
    assert {name for name in loaded if name.startswith("ernie_quant")} == {
        "ernie_quant",
        "ernie_quant.library",
        "ernie_quant.version",
    }


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_example_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model of that name."""
    copy(SOURCE, tmp_path / "ERNIE-4.5-21B-A3B-Paddle")
    monkeypatch.chdir(tmp_path)
    example, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)  # the other: tests/serving
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(example, "docs/library.md", "exec"), {})
    text = said.getvalue()
    assert "<Result planned: out" in text
    assert "<Result done: out" in text
    assert "holds the result of another plan" in text
    assert "ernie-quant wint4 ERNIE-4.5-21B-A3B-Paddle OUT --experts-only --group-size 32" in text
    assert (tmp_path / "out.html").is_file()


def test_the_table_names_every_function() -> None:
    named = re.findall(r"^\| `(\w+)\(", (ROOT / "docs/library.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(set(ernie_quant.__all__) - {"ErnieQuantError"})


# --- plug-ins of other packages --------------------------------------------------------------------------------------


def test_a_plug_in_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """A codec under another name; one that has the name of a file here is not taken."""
    site = tmp_path / "site"
    (site / "their_package").mkdir(parents=True)
    (site / "their_package/__init__.py").touch()
    (site / "their_package/some_codec.py").write_text((ROOT / "ernie_quant/codecs/rtn.py").read_text())
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ernie_quant.codecs]\ntheirs = their_package.some_codec\nrtn = their_package.some_codec\n"
    )
    program = (
        "from ernie_quant import codecs, plugins;"
        "made = codecs.make('theirs', {'bits': 8, 'group_size': 32}); own = codecs.make('rtn', {'bits': 8});"
        "print(type(made).__module__, codecs.name_of(made), type(own).__module__, 'theirs' in plugins.names(codecs))"
    )
    environment = {"PYTHONPATH": f"{site}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["their_package.some_codec", "theirs", "ernie_quant.codecs.rtn", "True"], done.stderr


def test_json_of_the_estimate_is_plain() -> None:
    """Rows are dataclasses of plain values."""
    from dataclasses import asdict

    json.dumps([asdict(row) for row in ernie_quant.plan(SOURCE).rows])
