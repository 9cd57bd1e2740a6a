"""What is wrong is named in the order of the names, whatever the seed of a process's hashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.models import copy, random_model
from helpers.paths import ROOT
from helpers.results import edit

from ernie_quant.names import natural
from ernie_quant.weights import layouts

VERIFY = """
import sys
from pathlib import Path
from ernie_quant.checkpoint import Stamp
from ernie_quant.errors import CheckpointError
from ernie_quant.views.files import Files
from helpers.results import refused

out, source, report, texts = map(Path, sys.argv[1:])
print(*refused(out, source), "--", *refused(report), "--", sep="\\n")
paths = sorted(texts.iterdir())
files = Files({path: Stamp.of(path) for path in paths})
for path in paths:
    with files.opened(path):
        pass
    path.write_text("longer than before")
try:
    files.check()
except CheckpointError as error:
    print(error)
"""


def said(seed: int, *folders: Path) -> list[list[str]]:
    env = {"PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", VERIFY, *map(str, folders)]
    result = subprocess.run(line, capture_output=True, text=True, env=env, check=True)
    return [part.splitlines() for part in result.stdout.split("--\n")]


def test_problems_have_the_order_of_their_names(out: Path, tmp_path: Path) -> None:
    """The source has a layer less and two experts more; half of the report is about weights that are not there."""

    def rename(report: dict[str, list[dict[str, Any]]]) -> None:
        for row in report["tensors"][::2]:
            row["name"] += ".bak"

    changes = {"num_hidden_layers": 2, "moe_layer_end_index": 1, "moe_num_experts": 10}
    source = random_model(tmp_path / "source", layouts.PT, **changes)
    report = edit(copy(out, tmp_path / "report"), "report.json", rename)
    seen = []
    for seed in (1, 2):
        (tmp_path / "texts").mkdir(exist_ok=True)
        for number in range(12):
            (tmp_path / f"texts/{number:02}").write_text("before")
        seen.append(said(seed, out, source, report, tmp_path / "texts"))
    (against, reports, files) = seen[0]
    for lines, words in (
        (against, "is in the source, not in the result"),
        (against, "is in the result, not in the source"),
        (reports, "is in the report, not in the files"),
    ):
        names = [line.partition(":")[0] for line in lines if line.endswith(words)]
        assert len(names) >= 6, words
        assert names == sorted(names, key=natural)
    assert "texts/00: " in files[0]
    assert seen[0] == seen[1]
