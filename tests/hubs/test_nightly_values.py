"""A model with NaN or infinity is made and looked at, but no night publishes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.hub import LoopbackHub
from helpers.hubs import uploads
from helpers.models import random_model, tensors
from helpers.nights import PT, WINT4, Night, statuses
from helpers.results import WIDTHS
from helpers.runs import SOURCE
from safetensors.torch import save_file

from ernie_quant.weights import layouts

pytestmark = uploads

NORM = "model.layers.1.input_layernorm.weight"


def spoiled(folder: Path, value: float) -> Path:
    """A model with one other value in a norm, which is kept."""
    random_model(folder, layouts.PT, "moe", **WIDTHS["moe"])
    table = {name: tensor.clone() for name, tensor in tensors(folder).items()}
    table[NORM][0] = value
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_it_is_refused_by_name_every_night(value: float, hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    source = spoiled(tmp_path / "src", value)
    for _ in range(2):
        result = night(PT, WINT4, source=source)
        assert (statuses(result), result.exit_code) == (["failed", "failed"], 1)
        for target in result.targets:
            assert f"is not published, its weights hold NaN or infinity\n  {NORM}" in target.error
    assert "me/tiny-pt" not in hub.store.repos
    assert not tensors(night.place(PT))[NORM].isfinite().all()


def test_zeros_in_a_bias_are_published(hub: LoopbackHub, night: Night) -> None:
    assert statuses(night(PT, source=SOURCE)) == ["published"]
    assert hub.repo("me/tiny-pt").read("report.json").count(b"only_zeros") == 0


def test_a_disk_that_does_not_tell_is_in_the_log(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    assert statuses(night(PT, source=SOURCE)) == ["published"]
    assert [event["note"] for event in night.events if event["event"] == "note"] == [
        f"{night.work}: the disk reports no free space; whether the result fits is not known"
    ]
