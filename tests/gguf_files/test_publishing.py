"""Several types in one repository: each with its report, and a page that lists them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.paths import GOLDEN

from ernie_quant import hubs, plugins, publish
from ernie_quant.errors import HubError
from ernie_quant.nightly.job import read_job
from ernie_quant.nightly.run import run_job
from ernie_quant.planning.gguf import gguf_plan
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source

EXAMPLES = Path(__file__).parents[1] / "contract/examples/shelf"


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub in a folder."""
    shutil.copytree(EXAMPLES, tmp_path / "plugins/shelf")
    (tmp_path / "plugins/shelf/__init__.py").touch()
    monkeypatch.setattr(hubs, "__path__", [*hubs.__path__, str(tmp_path / "plugins")])
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    monkeypatch.setattr("ernie_quant.publish.files._pictures", lambda report: {})
    plugins.known.cache_clear()
    yield tmp_path / "shelf/me/moe-GGUF"
    monkeypatch.undo()
    plugins.known.cache_clear()
    for name in [name for name in sys.modules if name.startswith("ernie_quant.hubs.shelf")]:
        del sys.modules[name]
    vars(hubs).pop("shelf", None)


def made(out: Path, type_: str) -> Path:
    run_plan(gguf_plan(open_source(GOLDEN / "moe/pt"), settings={"type": type_, "keep_unfit": True}), out)
    return out


def test_types_share_a_repository(tmp_path: Path, shelf: Path) -> None:
    place = publish.Destination("me/moe-GGUF")
    for type_ in ("Q8_0", "F16"):
        done = publish.publish(made(tmp_path / type_, type_), hubs.publisher("shelf"), place)
        assert done.status == "published"
    now = shelf / (shelf / "main").read_text()
    names = {p.relative_to(now).as_posix() for p in now.rglob("*") if p.is_file()}
    own = {"README.md", "ernie-quant.json", "report.json", "report.html", "SHA256SUMS"}
    assert names == {"README.md", "pt-Q8_0.gguf", "pt-F16.gguf"} | {f"{t}/{name}" for t in ("Q8_0", "F16") for name in own}
    page = (now / "README.md").read_text()
    assert "| [F16](F16/README.md) |" in page
    assert "`pt-Q8_0.gguf`" in page
    assert "ollama run hf.co/me/moe-GGUF:TYPE" in page
    assert publish.publish(tmp_path / "Q8_0", hubs.publisher("shelf"), place).status == "up-to-date"
    assert json.loads((now / "Q8_0/ernie-quant.json").read_text())["recipe"]["name"] == "Q8_0"


def test_a_repository_of_another_kind_is_refused(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    assert command("wint4", GOLDEN / "moe/pt", tmp_path / "w4", "--group-size", "32", "-q")[0] == 0
    place = publish.Destination("me/moe-GGUF")
    publish.publish(made(tmp_path / "q8", "Q8_0"), hubs.publisher("shelf"), place)
    with pytest.raises(HubError, match=r"holds GGUF files \(Q8_0\)"):
        publish.publish(tmp_path / "w4", hubs.publisher("shelf"), place)
    other = publish.Destination("me/w4")
    publish.publish(tmp_path / "w4", hubs.publisher("shelf"), other)
    with pytest.raises(HubError, match="holds a result that has it to itself"):
        publish.publish(tmp_path / "q8", hubs.publisher("shelf"), other)


def test_a_nightly_job_makes_both_and_then_nothing(tmp_path: Path, shelf: Path) -> None:
    job = tmp_path / "job.toml"
    target = '[[target]]\nrepo = "shelf://me/moe-GGUF"\nrecipe = "gguf"\nkeep_unfit = true\ntype = "{}"\n'
    targets = "".join(map(target.format, ("Q8_0", "Q4_K_M")))
    job.write_text(f'[source]\nrepo = "{GOLDEN / "moe/paddle"}"\n{targets}')
    first = run_job(read_job(job), tmp_path / "work")
    assert [target.status for target in first.targets] == ["published", "published"]
    commit = (shelf / "main").read_text()
    again = run_job(read_job(job), tmp_path / "work")
    assert [target.status for target in again.targets] == ["up-to-date", "up-to-date"]
    assert (shelf / "main").read_text() == commit
    assert {p.name for p in (shelf / commit).glob("*.gguf")} == {"paddle-Q8_0.gguf", "paddle-Q4_K_M.gguf"}
