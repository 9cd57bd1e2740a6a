"""As many kv heads as heads: fine where q, k and v lie apart, refused where programs disagree about their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import random_model
from helpers.synthetic import exact, read_file, write_model

from ernie_quant.weights import layouts

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
Command = Callable[..., tuple[int, str, str]]
WHY = "config.json: num_key_value_heads equals num_attention_heads (4): in Paddle's layout programs disagree about the order"
HEADS, HEAD_DIM = 4, 16


def refused(found: tuple[int, str, str]) -> None:
    code, out, err = found
    assert (code, out, err.count("\n") <= 2, WHY in err) == (1, "", True, True), err


@pytest.mark.parametrize("kv_heads", [4, None])
def test_pt_files_are_converted_and_quantized(command: Command, tmp_path: Path, kv_heads: Any) -> None:
    source = random_model(tmp_path / "src", layouts.PT, num_key_value_heads=kv_heads)
    code, out, err = command("inspect", source)
    assert (code, err, "kv_heads 4" in out) == (0, "", True)
    assert command("convert", source, tmp_path / "pt", "--to", "pt")[0] == 0
    assert exact(read_file(tmp_path / "pt/model.safetensors")) == exact(read_file(source / "model.safetensors"))
    for name, *options in (("wint4", "--group-size", "32"), ("wint8", "--group-size", "32")):
        assert command(name, source, tmp_path / name, *options)[0] == 0
        assert command("verify", tmp_path / name, "--against", source, "--full")[0] == 0
    config = json.loads((tmp_path / "wint4/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, kv_heads)
    assert command("dequantize", tmp_path / "wint4", tmp_path / "back", "--to", "pt")[0] == 0
    formats = json.loads(command("plan", source, "--json")[1])["formats"]
    assert [f["form"] for f in formats if f["program"] == "FastDeploy"] == []


def test_paddle_files_are_neither_read_nor_written(command: Command, tmp_path: Path) -> None:
    source = random_model(tmp_path / "src", layouts.PADDLE, num_key_value_heads=4)
    code, out, _ = command("inspect", source)
    assert (code, f"anomaly: {WHY}" in out) == (1, True)
    refused(command("convert", source, tmp_path / "out", "--to", "pt"))
    pt = random_model(tmp_path / "pt", layouts.PT, num_key_value_heads=4)
    refused(command("convert", pt, tmp_path / "out", "--to", "paddle"))
    refused(command("wint4", pt, tmp_path / "out", "--runtime", "fastdeploy"))
    assert command("wint4", pt, tmp_path / "int4", "--experts-only", "--group-size", "32")[0] == 0
    refused(command("dequantize", tmp_path / "int4", tmp_path / "out", "--to", "paddle"))


def test_by_kv_groups_there_is_one_order_only(command: Command, tmp_path: Path) -> None:
    """paddleformers: q, k and v of a head, then of the next."""
    pt = random_model(tmp_path / "pt", layouts.PT, num_key_value_heads=4)
    tensors = read_file(pt / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            rows = [tensors[name.replace("q_proj", f"{x}_proj")].view(HEADS, HEAD_DIM, -1) for x in "qkv"]
            stored[name.replace("q_proj", "qkv_proj")] = torch.stack(rows, 1).flatten(0, 2).t().contiguous()
        elif name.endswith("gate_proj.weight"):
            both = torch.cat([tensor, tensors[name.replace("gate_proj", "up_proj")]])
            stored[name.replace("gate_proj", "up_gate_proj")] = both.t().contiguous()
        elif name.endswith(("o_proj.weight", "down_proj.weight", "mlp.gate.weight")):
            stored[name] = tensor.t().contiguous()
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            stored[name] = tensor
    write_model(tmp_path / "src", json.loads((pt / "config.json").read_text()), stored)
    assert command("convert", tmp_path / "src", tmp_path / "out", "--to", "pt")[0] == 0
    assert exact(read_file(tmp_path / "out/model.safetensors")) == exact(tensors)
