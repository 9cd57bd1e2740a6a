"""Looking, planning and refusing need no PyTorch: these commands run where `import torch` fails, and what needs it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.disk import no_waiting
from helpers.models import GOLDEN, random_model, write
from helpers.nights import PT, job_file
from helpers.runs import SOURCE
from helpers.words import byte_tokenizer

from ernie_quant.planning import built_in

MISSING = ("torch", "numba", "numpy", "scipy", "llvmlite")
# as if they were not installed: neither found, nor imported, nor known by a version
WITHOUT = f"""
import sys
from importlib import metadata, machinery
missing = {MISSING!r}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
known = metadata.version
def version(name):
    if name in missing:
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
from ernie_quant.cli.main import main
sys.argv = ["ernie-quant", *sys.argv[1:]]
main()
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src and its containers for FastDeploy and vLLM, spoken (with a tokenizer), recipe.toml, job.toml."""
    folder = tmp_path_factory.mktemp("without")
    random_model(
        folder / "src", "paddle", "moe_mtp", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
        moe_num_experts=2,
    )  # fmt: skip
    byte_tokenizer(random_model(folder / "spoken", "pt", "moe", hidden_size=256, head_dim=64, moe_intermediate_size=256))
    (folder / "recipe.toml").write_text('[[rule]]\nrole = "experts"\ncodec = "rtn"\n')
    (folder / "text.txt").write_text("".join(f"{n} and {n * n}, " for n in range(5000)))
    job_file(folder, PT, source=SOURCE)
    with no_waiting():
        write(folder / "src", folder / "container", "fastdeploy", recipe=built_in.fastdeploy_container("wint2", 2, effort=1))
        write(folder / "src", folder / "wint4", "vllm", recipe=built_in.make("wint4", group_size=64).recipe)
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        line = [sys.executable, "-c", WITHOUT, *words]
        return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)

    return run


NO_TORCH = [
    "--version",
    "inspect src",
    "inspect wint4 --json",
    f"inspect {GOLDEN / 'moe/paddle_pdparams'}",
    "plan src",
    "plan src --recipe recipe.toml",
    "convert src OUT --to pt --dry-run",
    "gguf src OUT --dry-run",
    "wint4 src OUT --experts-only --dry-run",
    "wint4 src OUT --runtime fastdeploy --dry-run",
    "wint8 src OUT --dry-run --json",
    "fp8 src OUT --dry-run",
    "wint2 src OUT --wint4-layers 2 --tp 2 --dry-run",
    "quantize src OUT --recipe recipe.toml --dry-run",
    "dequantize container OUT --to pt --dry-run",
    "reshard container OUT --tp 2 --dry-run",
    "report wint4 --out page.html",
    "nightly job.toml --check",
]


@pytest.mark.parametrize("line", NO_TORCH)
def test_these_need_none(line: str, run: Run, folder: Path) -> None:
    done = run(*line.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert not (folder / "OUT").exists()


def test_a_calibrated_dry_run_needs_none(run: Run, folder: Path) -> None:
    """The text is read and cut into tokens, which needs transformers."""
    pytest.importorskip("transformers")
    done = run("wint4", "spoken", "OUT", "--experts-only", "--calibration", "text.txt", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "calibrated on " in done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("verify src", "error: src: has no ernie-quant.json; it was not made by ernie-quant"),
        ("verify nowhere", "error: nowhere: "),
        ("inspect nowhere", "error: nowhere: there is no such folder"),
        ("wint4 container OUT --experts-only", "error: container"),
        ("wint2 src OUT --wint4-layers 50", "error: src: cannot be done as asked"),
        ("quantize src OUT --recipe none.toml", "error: none.toml: cannot be read: "),
        ("nightly none.toml --check", "error: none.toml: "),
        ("publish src me/model", "error: src: has no ernie-quant.json"),
        ("report src", "error: src"),
    ],
)
def test_refusals_need_none(line: str, said: str, run: Run) -> None:
    done = run(*line.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)


@pytest.mark.parametrize(
    "line",
    [
        "convert src OUT --to pt",
        "wint4 src OUT --experts-only",
        "gguf src OUT",
        "reshard container OUT --tp 2",
        "dequantize container OUT --to pt",
        "verify wint4",
        "eval spoken --text text.txt --tokens 511",
        "calibrate spoken stats.safetensors --text text.txt --tokens 512",
    ],
)
def test_what_needs_it_says_so_in_one_line(line: str, run: Run, folder: Path) -> None:
    done = run(*line.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(("error: this needs PyTorch: pip install ", "error: this needs numpy: pip install "))
    assert not (folder / "OUT").exists()
