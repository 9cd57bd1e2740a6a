"""What the documents show is what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.paths import ROOT

from ernie_quant.nightly.job import read_job


def blocks(file: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def test_the_job_of_the_documents_is_one(tmp_path: Path) -> None:
    (text,) = blocks("docs/nightly.md", "toml")
    (tmp_path / "job.toml").write_text(text)
    job = read_job(tmp_path / "job.toml")
    assert [(t.recipe.name, t.runtime, t.tp) for t in job.targets] == [
        ("wint4", "vllm", 1),
        ("wint2", "fastdeploy", 2),
        ("wint4", "vllm", 1),
        ("rules", "vllm", 1),
    ]
    assert (job.disk_budget, job.max_hours) == (30 * 10**9, 8)


def test_every_link_to_a_document_leads_somewhere() -> None:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tests/README.md"]
    links = [(file, target) for file in files for target in re.findall(r"\]\(([^)#]+)\)", file.read_text())]
    assert len(links) > len(files) > 2
    for file, target in links:
        assert "://" in target or (file.parent / target).exists(), f"{file.name}: {target}"
