"""`eval` of a repository: its files come layer by layer, the tokenizer with the headers."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.commands import Command
from helpers.hub import LoopbackHub
from helpers.hubs import files_of
from helpers.models import copy, write
from helpers.synthetic import tiny, write_model
from helpers.words import byte_tokenizer

from ernie_quant.planning import built_in


def test_both_sides_on_a_hub(hub: LoopbackHub, waits: list[float], cache: Path, tmp_path: Path, command: Command) -> None:
    source = byte_tokenizer(write_model(tmp_path / "source", *tiny("moe_hf"), shards=5))
    write(source, tmp_path / "out", recipe=built_in.make("wint4", "vllm", group_size=32, experts_only=True).recipe)
    (tmp_path / "book.txt").write_text("".join(f"{n} and {n * n}.\n" for n in range(100)))
    hub.put("org/source", source)
    hub.put("org/out", copy(tmp_path / "out", tmp_path / "published"))
    text = ("--text", tmp_path / "book.txt", "--tokens", 511, "--json")
    code, there, err = command("eval", "hf://org/out", "--against", "hf://org/source", *text)
    assert (code, err) == (0, "")
    code, here, _ = command("eval", tmp_path / "out", "--against", source, *text)
    found, local = json.loads(there), json.loads(here)
    assert found["rows"] == local["rows"]
    assert found["rows"][0]["kl"]["value"] > 0
    assert found["source"]["address"] == "hf://org/source"
    assert found["result"]["fingerprint"] == local["result"]["fingerprint"] != ""
    assert files_of(cache) == []  # weights are dropped after their use
