"""Folders of results with their pages, and a browser; without Chromium on the machine its tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.calibrated import calibrated, worded
from helpers.disk import no_waiting
from helpers.models import invoke, random_model, write
from helpers.pages import HOSTILE, folder_of, large, measured, row
from helpers.paths import GOLDEN

from ernie_quant import codecs
from ernie_quant.planning import built_in
from ernie_quant.reporting import page, saved
from ernie_quant.reporting import rows as report


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of results, each with its page."""
    base = tmp_path_factory.mktemp("results")
    codec = codecs.make("rtn", {"bits": 4, "group_size": "channel", "scale": "mse"})
    wint4 = built_in.one_codec("wint4", codec, experts_only=False, mtp=True, keep_unfit=False)
    with no_waiting():
        for family in ("dense", "moe", "moe_mtp", "vl"):
            write(GOLDEN / family / "paddle", base / family, recipe=wint4)
        write(GOLDEN / "moe/paddle", base / "converted")
        random_model(
            base / "src", "paddle", "moe_mtp", hidden_size=256, head_dim=64, intermediate_size=256, moe_intermediate_size=256,
            moe_num_experts=4,
        )  # fmt: skip
        write(base / "src", base / "container", "fastdeploy", recipe=built_in.fastdeploy_container("wint2", 2, effort=1))
        calibrated(worded(base / "src-of-text"), base / "calibrated")
        invoke("gguf", GOLDEN / "moe/paddle", base / "gguf", "--type", "Q4_0", "--keep-unfit", "--quiet")
        rows, said = measured(large())
        folder_of(base / "large-calibrated", rows, calibration=said)
        folder_of(base / "large", large(), notes=["FD_USE_MACHETE=0 is needed"])
        rows = [row(name, name, name, (64, 64), 4.5, 0.01 + i / 1000) for i, name in enumerate(HOSTILE)]
        folder_of(base / "hostile", rows, recipe=HOSTILE[0], runtime=HOSTILE[1], notes=HOSTILE)
        found = {p.name: p for p in base.iterdir() if not p.name.startswith(("src", "book"))}
        for out in found.values():
            page.write(saved.read(out), out / report.PAGE)
    return found
