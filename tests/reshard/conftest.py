"""Containers of every number of ranks, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.disk import no_waiting
from helpers.models import invoke, random_model
from helpers.ranks import MAKE, WIDTHS

from ernie_quant.weights import layouts


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src; for each form FORM/1, and FORM/2, FORM/4, FORM/back, each resharded from the one before; FORM/tp2 by --tp 2."""
    folder = tmp_path_factory.mktemp("reshard")
    with no_waiting():
        random_model(folder / "src", layouts.PADDLE, "moe_mtp", **WIDTHS)
        (folder / "src/tokenizer.model").write_bytes(b"tokens")
        for form, (name, *options) in MAKE.items():
            (folder / form).mkdir()
            invoke(name, folder / "src", folder / form / "1", *options, "--quiet")
            for before, after, tp in (("1", "2", 2), ("2", "4", 4), ("4", "back", 1)):
                invoke("reshard", folder / form / before, folder / form / after, "--tp", tp, "--quiet")
            invoke(name, folder / "src", folder / form / "tp2", *options, "--tp", 2, "--quiet")
    return folder
