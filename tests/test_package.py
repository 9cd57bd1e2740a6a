"""What is installed: wheel and source archive hold what they should, and the wheel works; bounds and lists are true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.models import GOLDEN
from helpers.packages import ROOT, build, environment
from packaging.requirements import Requirement
from packaging.version import Version

import ernie_quant

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITH_TORCH = {"scipy", "torch", "numpy", "numba"}  # what a look at headers needs not


def requirements() -> Iterator[Requirement]:
    """All that pyproject.toml asks for, but what only checks the code, and the project itself."""
    lists = [PROJECT["dependencies"], *(v for k, v in PROJECT["optional-dependencies"].items() if k != "lint")]
    found = [Requirement(line) for one in lists for line in one]
    yield from (r for r in found if r.name != PROJECT["name"])


def lowest(requirement: Requirement) -> Version:
    (bound,) = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
    return Version(bound)


def lines(file: str) -> list[Requirement]:
    return [Requirement(line) for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]


def test_every_package_has_a_lowest_version_and_it_is_the_one_that_is_tested() -> None:
    bounds = {r.name: lowest(r) for r in requirements() if r.name != "torch"}
    assert {r.name: lowest(r) for r in lines("tests/lowest.txt")} == bounds
    assert len(bounds) > 20


def test_a_package_has_one_bound_wherever_it_is_asked_for() -> None:
    found: dict[str, set[str]] = {}
    for requirement in requirements():
        found.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: bounds for name, bounds in found.items() if len(bounds) > 1} == {}


def test_what_is_installed_without_torch() -> None:
    wanted = {str(r) for r in map(Requirement, PROJECT["dependencies"]) if r.name not in WITH_TORCH}
    assert {str(r) for r in lines("requirements-no-torch.txt")} == wanted


def test_versions_of_python_and_systems_are_those_that_are_tested() -> None:
    ending = "Programming Language :: Python :: 3."
    named = [c.removeprefix(ending) for c in PROJECT["classifiers"] if c.startswith(ending)]
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert named == ["11", "12", "13"]
    assert all(f'"3.{minor}"' in workflow for minor in named)
    systems = {c for c in PROJECT["classifiers"] if c.startswith("Operating System")}
    assert systems == {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"}


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {ernie_quant.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def of_checkout(*folders: str) -> set[str]:
    """Files of these folders that a checkout has."""
    files = (p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts and p.suffix not in (".whl", ".pyc")}


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {f"ernie_quant/{name}" for name in of_checkout("cli", "calibration")} | of_checkout("ernie_quant")
    links = {f"ernie_quant/{name}" for name in ("cli", "calibration")}
    assert names == {name for name in wanted if not any(name.startswith(f"ernie_quant/{link}/") for link in links)}
    for name in ("py.typed", "reporting/pages/report.html", "calibration/auto/english.jsonl", "cli/main.py"):
        assert f"ernie_quant/{name}" in names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as found:
        (folder,) = {name.partition("/")[0] for name in found.namelist() if ".dist-info/" in name}
        metadata = found.read(f"{folder}/METADATA").decode()
        assert f"{folder}/licenses/LICENSE" in found.namelist()
    head = metadata.partition("\n\n")[0].splitlines()
    assert {"Author: ernie-quant contributors", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(head)
    assert "Classifier: Typing :: Typed" in head


def test_the_source_archive_holds_what_its_tests_need(sdist: set[str]) -> None:
    needed = of_checkout("tests", "docs", "benchmarks", "cli", "calibration", "ernie_quant", ".github")
    assert needed - sdist == set()
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "Dockerfile", "requirements-no-torch.txt"}
    assert files - sdist == set()
    assert {name for name in sdist if name.endswith((".whl", ".pyc", ".nbi")) or "__pycache__" in name} == set()


def test_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, far from the checkout: help, a look, a conversion that is verified, with its page."""
    python = environment(tmp_path / "venv", wheel)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words: object) -> str:
        line = [python.parent / "ernie-quant", *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    where = subprocess.run([python, "-c", "import ernie_quant.cli; print(ernie_quant.cli.__file__)"], cwd=tmp_path, env=env,
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
    source = GOLDEN / "moe/paddle"
    assert "Convert and quantize ERNIE" in run("--help")
    assert json.loads(run("inspect", source, "--json"))["tensors"] == 57
    run("convert", source, "out", "--to", "pt")
    assert "verified" in run("verify", "out", "--against", source)
    run("report", "out")
    assert (tmp_path / "out/report.html").is_file()


USER = """
from pathlib import Path

import ernie_quant


def small(source: Path, out: str) -> float:
    found = ernie_quant.inspect(source)
    print(found.family, found.dims["H"], found.anomalies)
    for row in ernie_quant.plan(str(source), gpu_memory=["H100", "24GiB"]).rows:
        print(row.form, row.weight_bytes / 2**30, [fit.gpus or fit.why for fit in row.fits])
    result = ernie_quant.quantize(source, out, "wint4", experts_only=True, max_shard_size="2GB", workers=2)
    ernie_quant.convert(source, out, to="pt", dry_run=True, progress=lambda done: None, each=lambda file: print(file.filename))
    ernie_quant.dequantize(out, "plain", to="paddle")
    ernie_quant.reshard(out, "ranks", tp=2, copy=["*.pdf"])
    print(ernie_quant.verify(out, against=source).compared.total, ernie_quant.report(out).rows[0].rel_error)
    return max(result.tensors, key=lambda tensor: tensor.rel_error).rel_error


try:
    small(Path("a"), "b")
except ernie_quant.ErnieQuantError as error:
    print(error)
"""
MISTAKES = """
import ernie_quant

ernie_quant.convert("a", "b", to="gguf")
ernie_quant.reshard("a", "b")
ernie_quant.convert("a", "b", to="pt", worker=3)
ernie_quant.inspect("a").familly
"""


def test_a_strict_type_check_of_a_users_program_passes(wheel: Path, tmp_path: Path) -> None:
    """Against the installed wheel, with the hints that it has; and mistakes are found."""
    pytest.importorskip("mypy")
    python = environment(tmp_path / "venv", wheel)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mistakes.py").write_text(MISTAKES)

    def check(file: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache", file]
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    right, wrong = check("user.py"), check("mistakes.py")
    assert (right.returncode, right.stdout) == (0, "Success: no issues found in 1 source file\n")
    assert wrong.returncode == 1
    assert {int(line.split(":")[1]) for line in wrong.stdout.splitlines() if ": error: " in line} == {4, 5, 6, 7}
