"""The command line: help that is true, one JSON result, exit codes, silence where nobody watches, and no heavy imports."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from ernie_quant.cli.main import COMMANDS, group
from helpers.commands import Command
from helpers.disk import no_waiting
from helpers.models import GOLDEN, copy, random_model, write
from helpers.paths import ROOT

from ernie_quant.planning import built_in

DOCUMENT = ROOT / "docs/cli.md"
SOURCE = GOLDEN / "moe/paddle"


pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


# --- help ------------------------------------------------------------------------------------------------------------


def help_of(*command: str) -> str:
    result = CliRunner().invoke(group, [*command, "--help"], prog_name="ernie-quant", terminal_width=100)
    assert result.exit_code == 0
    return result.output


def rendered() -> str:
    """docs/cli.md: what --help says, of the group and of every command."""
    parts = ["# Command line\n\nWritten by `pytest --update-golden tests/test_cli.py` from what `--help` says."]
    parts.append(f"## ernie-quant\n\n```text\n{help_of().rstrip()}\n```")
    parts += [f"## ernie-quant {name}\n\n```text\n{help_of(name).rstrip()}\n```" for name in COMMANDS]
    return "\n\n".join(parts) + "\n"


def test_docs_cli_md_is_what_help_says(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(rendered())
    assert DOCUMENT.read_text() == rendered()


def test_every_file_of_a_command_is_a_command() -> None:
    files = {p.stem for p in (ROOT / "cli").glob("*.py") if not p.stem.startswith("_")}
    assert files - {"main"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name: str) -> None:
    examples = re.findall(rf"^ *ernie-quant ({name} .+)$", help_of(name), re.MULTILINE)
    assert examples
    command = group.get_command(click.Context(group), name)
    assert command
    for example in examples:
        command.make_context(name, shlex.split(example)[1:])  # unknown options and missing arguments raise


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command
    assert [o.name for o in command.params if isinstance(o, click.Option) and not o.help] == []


# --- imports ---------------------------------------------------------------------------------------------------------

LOADED = """
import sys
from ernie_quant.cli.main import main
sys.argv = ["ernie-quant", *sys.argv[1:]]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print("LOADED", *sorted({"torch", "numba", "transformers", "numpy", "scipy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("wint4", "--help"),
        ("inspect", str(SOURCE)),
        ("inspect", str(GOLDEN / "moe/paddle_pdparams")),
        ("wint4", str(SOURCE), "nowhere", "--experts-only", "--group-size", "32", "--dry-run"),
        ("wint2", "--help"),
        ("plan", str(SOURCE)),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_to_look_at_headers(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout.splitlines()[-1].split() == ["LOADED"]


# --- containers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src, a small MoE with an MTP block whose widths 2 ranks can share, and wint2, its container."""
    folder = tmp_path_factory.mktemp("container")
    random_model(
        folder / "src", "paddle", "moe_mtp", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
        moe_num_experts=2,
    )  # fmt: skip
    with no_waiting():
        write(folder / "src", folder / "wint2", "fastdeploy", recipe=built_in.fastdeploy_container("wint2", 2, effort=1))
    return folder


# --- results ---------------------------------------------------------------------------------------------------------


def json_of(command: Command, *arguments: object) -> dict:
    code, out, err = command(*arguments, "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)  # one value, nothing around it
    assert isinstance(value, dict)
    return value


def test_inspect_gives_one_json_object(command: Command) -> None:
    found = json_of(command, "inspect", SOURCE)
    assert (found["family"], found["layout"], found["tensors"], found["anomalies"]) == ("ernie4_5_moe", "Paddle", 57, [])
    # 8 experts in two layers, three linears of 32 x 64 in bf16
    assert found["roles"]["experts"] == {"tensors": 48, "bytes": 48 * 32 * 64 * 2}


def test_convert_gives_one_json_object(command: Command, tmp_path: Path) -> None:
    arguments = ("convert", SOURCE, tmp_path / "out", "--to", "pt")
    done = json_of(command, *arguments)
    assert (done["status"], done["files"], done["quantized"], done["rel_error"]) == ("done", 1, 0, 0)
    assert done["bytes_in"] == done["bytes_out"]
    again = json_of(command, *arguments)
    assert again["status"] == "complete"


def test_wint4_and_verify_give_one_json_object_each(command: Command, tmp_path: Path) -> None:
    done = json_of(command, "wint4", SOURCE, tmp_path / "out", "--experts-only", "--group-size", "32")
    assert (done["status"], done["quantized"]) == ("done", 48)
    assert 0.001 < done["rel_error"] <= done["worst_rel_error"] < 0.02
    found = json_of(command, "verify", tmp_path / "out", "--against", SOURCE)
    assert (found["status"], found["quantized"], found["against"]) == ("verified", 48, True)


def test_a_dry_run_gives_one_json_object_and_writes_nothing(command: Command, tmp_path: Path) -> None:
    arguments = ("wint4", SOURCE, tmp_path / "out", "--experts-only", "--group-size", "32")
    planned = json_of(command, *arguments, "--dry-run")
    assert planned["status"] == "planned"
    assert sum(g["bytes_out"] for g in planned["groups"]) == planned["bytes_out"]
    assert sum(g["tensors"] for g in planned["groups"] if g["codec"] != "kept") == 48
    assert list(tmp_path.iterdir()) == []
    assert json_of(command, *arguments)["bytes_out"] == planned["bytes_out"]


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (("wint2", "--wint4-layers", "2"), 2),  # the model and the MTP block
        (("reshard", "--tp", "2"), 4),
        (("dequantize", "--to", "pt"), 1),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_dry_runs_around_a_container_write_nothing_and_import_nothing_heavy(
    arguments: tuple[str, ...], files: int, container: Path, tmp_path: Path
) -> None:
    source = container / ("src" if arguments[0] == "wint2" else "wint2")
    line = [sys.executable, "-c", LOADED, arguments[0], source, "out", *arguments[1:], "--dry-run", "--json"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=True)
    text, _, loaded = result.stdout.rpartition("LOADED")
    planned = json.loads(text)
    assert (planned["status"], planned["files"], loaded.split()) == ("planned", files, [])
    assert list(tmp_path.iterdir()) == []


def test_wint2_reshard_dequantize_and_verify_give_one_json_object_each(container: Path, command: Command, tmp_path: Path) -> None:
    arguments = ("wint2", container / "src", tmp_path / "out", "--wint4-layers", 2, "--effort", 1)
    done = json_of(command, *arguments)
    # a dense layer, two MoE layers of 2 experts and the MTP block: attention and FFN have two linears each
    assert (done["status"], done["files"], done["quantized"]) == ("done", 2, 2 * (4 + 2 + 2 * 2))
    assert done["tp_sizes"] == [1, 2]
    assert json_of(command, *arguments)["status"] == "complete"
    shared = json_of(command, "reshard", tmp_path / "out", tmp_path / "two", "--tp", 2)
    assert (shared["status"], shared["files"], shared["rel_error"]) == ("done", 4, done["rel_error"])
    assert json_of(command, "verify", tmp_path / "two")["quantized"] == done["quantized"]
    plain = json_of(command, "dequantize", tmp_path / "two", tmp_path / "plain", "--to", "pt")
    assert (plain["status"], plain["quantized"], plain["rel_error"]) == ("done", 0, 0)


def test_plan_gives_one_json_object(command: Command) -> None:
    found = json_of(command, "plan", SOURCE, "--gpu-memory", "24GB")
    assert found["gpus"][0]["memory"] == 24 * 10**9
    assert (found["formats"][0]["form"], found["formats"][0]["fits"][0]["gpus"]) == ("convert --to pt", 1)


def test_a_dry_run_leaves_a_strangers_folder_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert command("convert", SOURCE, tmp_path, "--to", "pt", "--dry-run", "--restart")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_last_lines_say_how_to_run_the_result(command: Command, tmp_path: Path) -> None:
    code, out, err = command("wint4", SOURCE, tmp_path / "out", "--experts-only", "--group-size", "32")
    assert (code, err) == (0, "")
    vllm, transformers = out.splitlines()[-2:]
    assert vllm.startswith(f"  vLLM >= 0.13: vllm serve {tmp_path / 'out'} ")
    assert transformers.startswith("  transformers >= 5.17: python -c ")
    assert "Worst tensors:" in out
    assert "vllm serve out " in (tmp_path / "out/README.md").read_text()


def test_the_last_lines_say_how_to_run_a_container(container: Path, command: Command, tmp_path: Path) -> None:
    code, out, err = command("reshard", container / "wint2", tmp_path / "out", "--tp", 2)
    assert (code, err) == (0, "")
    (line, *_) = lines = [line for line in out.splitlines() if "api_server" in line]
    assert line.startswith("  FastDeploy: FD_USE_MACHETE=0 python -m fastdeploy.entrypoints.openai.api_server --model ")
    assert all("FD_USE_MACHETE=0 " in line and "--tensor-parallel-size 2 " in line for line in lines)


# --- exit codes ------------------------------------------------------------------------------------------------------


def test_zero_for_a_sound_checkpoint_one_for_an_anomaly(command: Command, tmp_path: Path) -> None:
    assert command("inspect", SOURCE)[0] == 0
    broken = copy(SOURCE, tmp_path / "broken")
    (broken / "model-00002-of-00005.safetensors").unlink()
    code, out, _ = command("inspect", broken)
    assert code == 1
    assert "anomaly: model-00002-of-00005.safetensors: named by model.safetensors.index.json, but is not there" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("inspect", "/nowhere"), "error: /nowhere: there is no such folder\n"),
        (("convert", "/nowhere", "out", "--to", "pt"), "error: /nowhere: there is no such folder\n"),
        (("wint2", "/nowhere", "out"), "error: /nowhere: there is no such folder\n"),
        (("reshard", "/nowhere", "out", "--tp", "2"), "error: /nowhere: there is no such folder\n"),
        (("dequantize", "/nowhere", "out", "--to", "pt"), "error: /nowhere: there is no such folder\n"),
        (("plan", "/nowhere"), "error: /nowhere: there is no such folder\n"),
        (("verify", SOURCE), f"error: {SOURCE}: has no ernie-quant.json; it was not made by ernie-quant\n"),
        (
            ("quantize", SOURCE, "out", "--recipe", "/nowhere.toml"),
            "error: /nowhere.toml: cannot be read: No such file or directory\n",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_one_and_one_line_for_bad_input(arguments: tuple[object, ...], line: str, command: Command) -> None:
    assert command(*arguments) == (1, "", line)


def test_experts_only_on_a_dense_model_says_what_to_do(command: Command, tmp_path: Path) -> None:
    code, out, err = command("wint4", GOLDEN / "dense/paddle", tmp_path / "out", "--experts-only")
    assert (code, out) == (1, "")
    assert "this model has no experts; without --experts-only its other linears are quantized" in err
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_is_refused(command: Command, tmp_path: Path) -> None:
    assert command("wint8", SOURCE, tmp_path / "once", "--group-size", "32")[0] == 0
    code, _, err = command("wint4", tmp_path / "once", tmp_path / "twice", "--group-size", "32")
    assert code == 1
    assert "is quantized already (config.json has quantization_config); start from the original checkpoint" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("explode",),
        ("convert", SOURCE, "out"),
        ("convert", SOURCE, "out", "--to", "onnx"),
        ("wint4", SOURCE),
        ("wint4", SOURCE, "out", "--group-size", "100"),
        ("wint4", SOURCE, "out", "--max-shard-size", "large"),
        ("wint4", SOURCE, "out", "--max-shard-size", "nanGB"),
        ("wint4", SOURCE, "out", "--workers", "0"),
        ("wint2", SOURCE, "out", "--wint4-layers", "-1"),
        ("wint2", SOURCE, "out", "--tp", "17"),
        ("wint2", SOURCE, "out", "--runtime", "vllm", "--tp", "2"),
        ("wint4", SOURCE, "out", "--tp", "2"),
        ("wint4", SOURCE, "out", "--runtime", "fastdeploy", "--group-size", "128"),
        ("reshard", SOURCE, "out"),
        ("dequantize", SOURCE, "out"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[-2:])),
)
def test_two_for_usage(arguments: tuple[object, ...], command: Command) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terminal", "options", "shown"), [(False, (), False), (True, (), True), (True, ("--quiet",), False)])
def test_progress_is_for_people_only(
    terminal: bool, options: tuple[str, ...], shown: bool, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: terminal)
    _, out, err = command("convert", SOURCE, tmp_path / "out", "--to", "pt", *options)
    assert bool(err) == shown
    assert ("B/s" in err) == shown
    if options:
        assert out == ""


# --- the 424B --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vl_424b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse files with the true geometry: 847 GB on paper."""
    out = tmp_path_factory.mktemp("geometry") / "vl-424b"
    subprocess.run([sys.executable, ROOT / "benchmarks/make_geometry.py", "vl-424b", out], check=True, capture_output=True)
    return out


def test_inspect_the_424b(vl_424b: Path, command: Command) -> None:
    code, out, err = command("inspect", vl_424b)
    assert (code, err) == (0, "")
    assert "13836 tensors (13683 x BF16, 153 x F32), 847.16 GB in 172 file(s)" in out
    assert "layers 54, dense layers 3, MoE layers 51, experts (text) 64, experts (vision) 64, vision blocks 32" in out
    assert out.endswith("no anomalies\n")


def test_dry_run_of_the_424b(vl_424b: Path, command: Command) -> None:
    planned = json_of(command, "wint4", vl_424b, vl_424b / "../out", "--experts-only", "--dry-run")
    total = json.loads((vl_424b / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert f"{total / 1e9:.1f}" == "847.2"
    # 51 layers, 64 experts each, three linears of 8192 x 3584 (text) and 8192 x 1536 (vision)
    linears = 51 * 64 * 3
    weights = linears * 8192 * (3584 + 1536)
    # int4, a bf16 scale per 128 weights, two int64 of weight_shape per linear
    assert planned["bytes_out"] == total - 2 * weights + weights // 2 + 2 * weights // 128 + 16 * 2 * linears
    assert planned["bytes_in"] == total
    assert len(planned["groups"]) < 60
