"""A calibrated result on another kind of processor: matrix products are summed in another order, and it is worth the same.

torch, MKL and oneDNN are told in a child process that they are on an older processor. numba's loops are exact on all of them
(tests/test_same_bytes.py), so that only the slow test compiles them again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ernie_quant.calibration.evaluate import evaluate, pair
from helpers.calibrated import TOKENS, book, calibrated
from helpers.models import random_model, tensors
from helpers.words import byte_tokenizer
from safetensors.torch import save_file

from ernie_quant.weights import layouts

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
NO_AVX = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",  # MKL heeds it on processors of any maker
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
GENERIC = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
INT4 = ("wint4", "--group-size", "32", "--fit")
WINT2 = ("wint2", "--wint4-layers", "2", "--fit")
WIDE = {"hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 256, "head_dim": 64, "moe_num_experts": 4}


def elsewhere(source: Path, out: Path, command: tuple[str, ...], **env: str) -> Path:
    """As helpers.calibrated does, in a process with other variables."""
    asked = ("--calibration", str(source.with_name("book.txt")), "--calibration-tokens", str(TOKENS), "--quiet")
    program = [sys.executable, "-m", "ernie_quant", command[0], str(source), str(out), *command[1:], *asked]
    subprocess.run(program, check=True, env=os.environ | env, timeout=600)
    return out


def here(source: Path, out: Path, command: tuple[str, ...]) -> Path:
    return calibrated(source, out, *command[1:], command=command[0], method="descent")


def report(folder: Path) -> Mapping[str, Any]:
    return json.loads((folder / "report.json").read_text())  # type: ignore[no-any-return]


def apart(one: float, other: float) -> float:
    """0.1: one is a tenth more than the other."""
    return max(one, other) / min(one, other) - 1


def differing(one: Path, other: Path) -> float:
    """Share of the bytes of codes that differ."""
    ours, theirs = tensors(one), tensors(other)
    codes = [name for name in ours if name.endswith(("_packed", "quant_weight"))]
    different = [ours[name].view(torch.uint8) != theirs[name].view(torch.uint8) for name in codes]
    return sum(int(part.sum()) for part in different) / sum(part.numel() for part in different)


def errors(folder: Path) -> dict[str, float]:
    """Output errors of quantized weights; a weight may have none on tokens to judge by."""
    return {row["name"]: row["output_error"] for row in report(folder)["tensors"] if row.get("output_error")}


def drifts(folder: Path) -> list[float]:
    return [layer["drift"] for layer in report(folder)["calibration"]["layers"]]


def test_a_small_model_has_the_same_codes_and_output_errors(model: Path, book: Path, tmp_path: Path) -> None:
    """Seen: the same codes, and output errors and drifts that differ by 1e-5 of them."""
    one, other = here(model, tmp_path / "one/out", INT4), elsewhere(model, tmp_path / "other/out", INT4, **NO_AVX)
    assert differing(one, other) < 0.01
    ours, theirs = errors(one), errors(other)
    assert max(apart(ours[name], theirs[name]) for name in ours) < 0.01
    assert max(map(apart, drifts(one), drifts(other))) < 0.01


def lively(folder: Path) -> Path:
    """A model with random weights whose layers do something: outputs are as large as inputs."""
    source = byte_tokenizer(random_model(folder, layouts.PADDLE, **WIDE))
    table = tensors(source)
    for name, weight in table.items():
        if "norm" in name:
            table[name] = torch.ones_like(weight)
        elif weight.ndim == 2 and "embed" not in name and "statics" not in name:
            table[name] = (weight.float() / 0.02 / weight.shape[0] ** 0.5).to(weight.dtype)
    save_file(table, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.slow
@pytest.mark.parametrize("command", [INT4, WINT2], ids=lambda c: c[0])
def test_a_wider_one_is_worth_the_same(command: tuple[str, ...], tmp_path: Path) -> None:
    """Seen: a quarter of the bytes differ, output errors by up to 15%, their mean by 2%, drifts by 13%, KL by 19%."""
    source, text = lively(tmp_path / "source"), book(tmp_path)

    def kl(out: Path) -> float:
        found = evaluate(pair(out, source), [text], 1022).rows[0].kl
        assert found is not None
        return found.value

    one = here(source, tmp_path / "one/out", command)
    ours = errors(one)
    for name, env in (("avx2", AVX2 | HASWELL), ("no avx", NO_AVX | GENERIC)):
        other = elsewhere(source, tmp_path / name / "out", command, **env, NUMBA_CACHE_DIR=str(tmp_path / "cache" / name))
        theirs = errors(other)
        of_each, of_mean = max(apart(ours[n], theirs[n]) for n in ours), apart(sum(ours.values()), sum(theirs.values()))
        of_drift, of_kl = max(map(apart, drifts(one), drifts(other))), apart(kl(one), kl(other))
        print(f"{command[0]}, {name}: {differing(one, other):.3f} of bytes, output errors of each {of_each:.3f}, of the mean")
        print(f"  {of_mean:.4f}, drift {of_drift:.3f}, KL {of_kl:.3f}")
        assert differing(one, other) < 0.6
        assert of_each < 0.4
        assert of_mean < 0.06
        assert max(of_drift, of_kl) < 1
