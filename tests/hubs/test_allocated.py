"""`allocate` of a repository, and its recipe in a nightly job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS, NAME, files_of, uploads
from helpers.models import GOLDEN, copy, invoke
from helpers.nights import Night, manifest, statuses
from helpers.words import byte_tokenizer

pytestmark = [uploads, pytest.mark.usefixtures("no_pictures", "no_waiting_for_the_disk")]


def test_from_a_hub_to_a_hub(hub: LoopbackHub, cache: Path, night: Night, tmp_path: Path) -> None:
    """The same recipe as from the folder; weights are dropped after their use; the night makes it, and then has nothing to do."""
    source = byte_tokenizer(copy(GOLDEN / "moe_hf/pt", tmp_path / "src"))
    hub.put(NAME, source)
    (tmp_path / "book.txt").write_text("".join(f"{n} and {n * n}.\n" for n in range(100)))
    options = ("--bits", 10, "--text", tmp_path / "book.txt", "--tokens", 256, "--json", "--quiet")
    there = json.loads(invoke("allocate", ADDRESS, "-o", night.folder / "recipe.toml", *options))
    here = json.loads(invoke("allocate", source, "-o", tmp_path / "recipe.toml", *options))
    assert there["groups"] == here["groups"]
    assert (night.folder / "recipe.toml").read_text() == (tmp_path / "recipe.toml").read_text()
    assert [file for file in files_of(cache) if file.endswith(".safetensors")] == []
    target = '[[target]]\nrepo = "me/allocated"\nrecipe = "recipe.toml"\n'
    assert statuses(night(target)) == ["published"]
    made = manifest(hub, "me/allocated")
    assert (made["recipe"]["name"], made["runtime"]) == ("recipe", "vllm")
    assert statuses(night(target)) == ["up-to-date"]
