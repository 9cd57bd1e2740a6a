"""A model with NaN or infinity is made and looked at, but no night publishes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import Command
from helpers.disk import contents
from helpers.hub import LoopbackHub
from helpers.hubs import uploads
from helpers.models import copy, random_model, tensors, write
from helpers.nights import PT, WINT4, Night, statuses
from helpers.results import WIDTHS
from helpers.runs import SOURCE
from safetensors.torch import save_file

from ernie_quant.errors import CheckpointError
from ernie_quant.weights import layouts

pytestmark = uploads

REFUSED = (
    "is not published, its weights hold NaN or infinity;"
    " --allow-odd-values (in a job allow_odd_values = true) publishes it all the same"
)
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
            assert f"{target.repo}: {REFUSED}\n  {NORM}" in target.error
    assert "me/tiny-pt" not in hub.store.repos
    assert not tensors(night.place(PT))[NORM].isfinite().all()


def test_a_target_may_be_allowed_to(hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    source = spoiled(tmp_path / "src", float("nan"))
    assert statuses(night(f"{PT}allow_odd_values = true\n", WINT4, source=source)) == ["published", "failed"]
    assert b'"not_finite": 1' in hub.repo("me/tiny-pt").read("report.json")


def test_by_hand_it_is_refused_in_the_same_words(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(spoiled(tmp_path / "src", float("inf")), out)
    before = contents(out)
    assert command("publish", out, "me/odd") == (1, "", f"error: me/odd: {REFUSED}\n  {NORM}\n")
    assert "me/odd" not in hub.store.repos
    assert contents(out) == before  # no card under a name that it does not get
    code, _, err = command("publish", out, "me/odd", "--allow-odd-values", "--quiet")
    assert (code, err) == (0, "")
    assert b'"not_finite": 1' in hub.repo("me/odd").read("report.json")


def test_links_are_followed_where_the_job_says_so(hub: LoopbackHub, night: Night, tmp_path: Path) -> None:
    source = copy(SOURCE, tmp_path / "src")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = sorted(source.glob("*.safetensors"))[0]
    moved.rename(elsewhere / moved.name)
    moved.symlink_to(elsewhere / moved.name)
    with pytest.raises(CheckpointError, match="outside the folder"):
        night(PT, source=source)
    assert statuses(night(PT, source=f'{source}"\nfollow_links = true # "')) == ["published"]


def test_the_disk_is_not_asked_where_the_job_says_so(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=9, used=5, free=4))
    result = night(PT, source=SOURCE)
    assert statuses(result) == ["retry"]
    assert "more than the disk has free" in result.targets[0].error
    assert statuses(night(PT, source=SOURCE, more="[limits]\nno_space_check = true\n")) == ["published"]


def test_zeros_in_a_bias_are_published(hub: LoopbackHub, night: Night) -> None:
    assert statuses(night(PT, source=SOURCE)) == ["published"]
    assert hub.repo("me/tiny-pt").read("report.json").count(b"only_zeros") == 0


def test_a_disk_that_does_not_tell_is_in_the_log(hub: LoopbackHub, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    assert statuses(night(PT, source=SOURCE)) == ["published"]
    assert [event["note"] for event in night.events if event["event"] == "note"] == [
        f"{night.work}: the disk reports no free space; whether the result fits is not known"
    ]
