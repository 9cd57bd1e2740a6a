"""Containers of every kind, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.containers import LAYERS, WIDTHS
from helpers.disk import no_waiting
from helpers.models import invoke, random_model, write

from ernie_quant.weights import layouts


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src (and pt, the same in PT layout), src-shared; a container for each case, and those of src from PT."""
    folder = tmp_path_factory.mktemp("fastdeploy")
    with no_waiting():
        random_model(folder / "src", layouts.PADDLE, "moe_mtp", **WIDTHS)
        random_model(folder / "src-shared", layouts.PADDLE, "moe_mtp", **WIDTHS, moe_num_shared_experts=2)
        for source, pt in (("src", "pt"), ("src-shared", "pt-shared")):
            write(folder / source, folder / pt)
        for case, (name, *options) in LAYERS.items():
            for source in ("src", "pt"):
                suffix = "-shared" if case == "shared" else ""
                text = invoke(name, folder / f"{source}{suffix}", folder / f"{case}-{source}", *options)
                (folder / f"{case}-{source}.txt").write_text(text)
    return folder
