"""Reports that no run has made: of 54 layers, of strangers' words; and the pages of them."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ernie_quant.reporting import rows as report
from ernie_quant.reporting.rows import TensorReport, to_json

LAYERS, EXPERTS, MIXED = 54, 128, 7
TIMES = "\u00d7"
WINT2, WINT4, WINT8, KEPT = "wint2 (CCQ)", "int4 (-7 to 7), per channel, mse", "int8 (-127 to 127), per channel, mse", "kept"
HOSTILE = [
    "</script><img src=x onerror=window.pwned=1>",
    "model.layers.0.<script>window.pwned=1</script>.weight",
    "<!--<script>",
    '"><svg onload=window.pwned=1>',
    "{{script}}{{data}}",
    "&lt;b&gt;.$\\frac{1}{2}$",
    "model.layers.0.\u202egnp.weight",
    "__proto__.constructor",
]


def row(name: str, role: str, codec: str, shape: tuple[int, ...], bits: float, error: float) -> TensorReport:
    weights = math.prod(shape)
    decibels = -10 * math.log10(error) if error else None
    norm = 4e-4 * weights
    return TensorReport(
        name, role, codec, shape, int(weights * bits / 8), bits, error, decibels, error / 7, error * norm, norm, (name,), "0" * 8
    )


def large() -> list[TensorReport]:
    """54 layers of 128 experts: WINT4 in the first 7 layers, WINT2 after, the last as it was; one expert is by far the worst."""
    rows = [row("model.embed_tokens.weight", "embeddings", KEPT, (103424, 8192), 16, 0)]
    for layer in range(LAYERS):
        p = f"model.layers.{layer}"
        rows += [
            row(f"{p}.self_attn.{x}_proj.weight", "attention", WINT8, (8192, 8192), 8.004, 5e-5 + 1e-7 * layer) for x in "qkvo"
        ]
        rows.append(row(f"{p}.input_layernorm.weight", "norms", KEPT, (8192,), 16, 0))
        codec, bits, least = (WINT4, 4.009, 0.0119) if layer < MIXED else (WINT2, 2.38, 0.0851)
        for expert, (i, x) in itertools.product(range(EXPERTS), enumerate(("down", "gate", "up"))):
            error = least * (1 + 0.1 * math.sin(37.1 * layer + 11.3 * expert + i))
            error *= 2.5 if (layer, expert, x) == (31, 77, "up") else 1
            if layer == LAYERS - 1:
                codec, bits, error = KEPT, 16, 0.0
            rows.append(row(f"{p}.mlp.experts.{expert}.{x}_proj.weight", "experts", codec, (3584, 8192), bits, error))
    return rows


def measured(rows: list[TensorReport]) -> tuple[list[TensorReport], dict[str, Any]]:
    """The same after a text was run through the model, and what its report says of it: expert 5 of layer 9 had no token."""
    found = [
        replace(r, output_error=r.rel_error / 3.0001, calibration_tokens=16384) if r.role == "experts" and r.rel_error else r
        for r in rows
    ]
    counts = [[0 if (layer, e) == (9, 5) else 1000 + e + layer for e in range(EXPERTS)] for layer in range(LAYERS - 1)]
    layers = [{"layer": i, "drift": 1.234567e-4 * (i + 1), "expert_tokens": tokens} for i, tokens in enumerate(counts)]
    said = {
        "name": "auto", "sha256": {"english": "0" * 64}, "tokens": 16384, "judging_tokens": 2560, "window": 512, "seed": 0,
        "method": "descent", "fit": True, "layers": layers,
    }  # fmt: skip
    return found, said


def folder_of(out: Path, rows: list[TensorReport], **header: Any) -> Path:
    """As much of a finished result as the page reads."""
    out.mkdir(parents=True)
    (out / "report.json").write_text(to_json(rows, {"recipe": "wint2", "runtime": "fastdeploy", "notes": [], **header}))
    source = {"revision": "main", "files": {"model.safetensors": {"bytes": 10**12, "header": "0"}, "LICENSE": {"bytes": 7}}}
    (out / "ernie-quant.json").write_text(json.dumps({"source_name": "ERNIE", "version": "1", "source": source, "files": {}}))
    return out


RESULTS = ("dense", "moe", "moe_mtp", "vl", "converted", "container", "calibrated", "gguf", "large", "hostile")
over_results = pytest.mark.parametrize("name", RESULTS)


def text_of(out: Path) -> str:
    return (out / report.PAGE).read_text()


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    value: dict[str, Any] = json.loads(found)
    for s in value["series"]:
        s["ids"] = [column(ids) for ids in s["ids"]]
    return value


def column(ids: Any) -> list[int]:
    """Numbers in names, which may come as runs: a value, and how often it stands there."""
    if isinstance(ids, list):
        return ids
    pairs = zip(ids["runs"][::2], ids["runs"][1::2], strict=True)
    return [value for value, count in pairs for _ in range(count)]
