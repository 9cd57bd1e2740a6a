"""What a hint to install names: the real packages with their bounds, which any index knows; never the name of this project."""

from __future__ import annotations

import shlex
from importlib import metadata

import pytest
from helpers.commands import Command
from helpers.paths import GOLDEN, ROOT
from packaging.requirements import Requirement

from ernie_quant import needs
from ernie_quant.errors import NeedsError

EXTRAS = ("calibration", "plots", "modelscope", "aistudio", "transformers", "llama-cpp")
METADATA = ["torch>=2.6", 'gguf>=0.17; extra == "llama-cpp"', 'a.b-c<1,>=0.4; (python_version > "3") and extra == "plots"']


def installed(extra: str) -> list[str]:
    """What the metadata say of an extra, read by the library that pip reads them with."""
    found = [Requirement(line) for line in metadata.requires("ernie-quant") or []]
    one = [r for r in found if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})]
    return [f"{r.name}{r.specifier}" for r in one]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_hint_has_every_package_of_an_extra(extra: str) -> None:
    wanted = installed(extra)
    assert wanted
    assert shlex.split(needs.install_extra(extra)) == ["pip", "install", *wanted]


def test_a_hint_for_one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: METADATA)
    assert needs.install("torch") == "pip install 'torch>=2.6'"
    assert needs.install("gguf") == "pip install 'gguf>=0.17'"
    assert needs.install("unheard-of") == "pip install unheard-of"
    assert needs.install_extra("plots") == "pip install 'a.b-c<1,>=0.4'"


def test_a_program_that_runs_uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> None:
        raise metadata.PackageNotFoundError("ernie-quant")

    monkeypatch.setattr(metadata, "requires", none)
    assert needs.install("torch") == "pip install torch"
    assert needs.install_extra("plots") == "pip install '.[plots]' in the folder of ernie-quant"


@pytest.mark.parametrize("name", ["torch", "torch._C", "numba", "modelscope_hub", "google.protobuf"])
def test_an_import_that_failed(name: str) -> None:
    said = needs.of_import(ModuleNotFoundError(name=name))
    assert isinstance(said, NeedsError)
    assert "pip install " in str(said)


@pytest.mark.parametrize("name", ["ernie_quant.planning.nothing", "_ssl", None])
def test_our_own_mistakes_stay_mistakes(name: str | None) -> None:
    assert needs.of_import(ModuleNotFoundError(name=name)) is None


def test_a_mistake_of_ours_is_a_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'ernie_quant.nothing'", name="ernie_quant.nothing")

    monkeypatch.setattr("ernie_quant.inspection.inspect", broken)
    with pytest.raises(ModuleNotFoundError):
        command("inspect", GOLDEN / "moe/paddle")


def test_no_text_installs_a_name_that_no_index_has() -> None:
    folders = ("ernie_quant", "cli", "calibration", "docs", "tests", "benchmarks")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".toml")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "Dockerfile")]
    assert len(files) > 200
    wrong = [p for p in files if any("ernie-quant".join(around) in p.read_text() for around in (("install ", ""), ("", "[")))]
    assert wrong == []
