"""FastDeploy's container: a decoder of numpy and the specification, nothing of the package, and the cases of the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.bits import F, bf16

# H 256, Q 384, KV 128, I 320, M 128 or shared 256: a dense layer, two with 3 experts, an MTP block; no linear is square
WIDTHS: dict[str, Any] = {
    "hidden_size": 256, "head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 320,
    "moe_intermediate_size": 128, "moe_num_experts": 3, "moe_k": 2,
}  # fmt: skip
LAST = 2  # layer
EXPERT = "ernie.layers.2.mlp.experts.1.up_gate_proj"

ITEMS = {"U8": "<u1", "I8": "<i1", "BF16": "<u2", "F32": "<f4"}
Arrays = dict[str, np.ndarray]  # bf16 as u2


def read_file(path: Path) -> Arrays:
    """A safetensors file: 8 bytes of length, a JSON header, the tensors."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        item = ITEMS["BF16" if entry["dtype"] == "U16" else entry["dtype"]]
        found[name] = np.frombuffer(data[start + first : start + last], item).reshape(entry["shape"]).copy()
    return found


def read_folder(folder: Path) -> Arrays:
    """The root and the MTP block's own folder."""
    return {name: array for path in sorted(folder.rglob("*.safetensors")) for name, array in read_file(path).items()}


def widened(bits: np.ndarray) -> np.ndarray:
    """f32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(F)


def decode_wint2(parts: Arrays) -> np.ndarray:
    """[K, N] of the five tensors."""
    q, pairs = parts["quant_weight"].astype(np.float64), parts["weight_scale"]
    fused = (q * parts["code_scale"].astype(np.float64) + parts["code_zp"]).astype(F)  # rounded once
    code = np.floor(fused + F(0.5)).astype(np.int64) & 0x7FFF
    values = np.stack([(code >> shift & 63) - 32 for shift in (9, 6, 3, 0)], 1).reshape(-1, q.shape[1])
    local = np.stack([pairs >> 4, pairs & 15], 1).reshape(-1, q.shape[1])  # groups 2i, 2i + 1
    scale = bf16(local.astype(F) * widened(parts["super_scales"]))
    stored = bf16(values.astype(F) * scale.repeat(64, 0))
    weight = np.empty_like(stored)
    for group in range(0, len(stored), 64):
        for a in range(4):
            for b in range(8):
                for c in range(2):
                    weight[group + 8 * b + 2 * a + c] = stored[group + 16 * a + 2 * b + c]
    return weight


def decode_weight_only(parts: Arrays, bits: int) -> np.ndarray:
    """[K, N] of WINT4 or WINT8: the four passes, last one first."""
    packed = parts["quant_weight"]
    rows, k = packed.shape[0] * 8 // bits, packed.shape[1]
    raw = packed.view(np.uint8).reshape(-1)
    if bits == 8:  # (4) bytes 1 and 2 of every 4 are swapped, 128 is added
        u = raw.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1).astype(int) - 128
    else:  # (4) nibble p of a word of 8 holds element order[p], the low nibble first; 8 is added
        nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(-1, 8)
        u = np.empty(nibbles.shape, int)
        for p, element in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            u[:, element] = nibbles[:, p].astype(int) - 8
        u = u.reshape(-1)
    together = 16 // bits  # (3) columns take turns in tiles of 64
    columns = u.reshape(rows // together, k // 64, together, 64).transpose(0, 2, 1, 3).reshape(rows, k)
    permuted = columns.T  # (2)
    block, e = (16, 4) if bits == 8 else (32, 8)  # (1)
    code = np.empty_like(permuted)
    for first in range(0, k, block):
        for t in range(block):
            code[first + 8 * ((t % e) // 2) + t % 2 + 2 * (t // e)] = permuted[first + t]
    return bf16(code.astype(F) * widened(parts["weight_scale"]))


PARTS = {
    2: {"quant_weight": "u1", "weight_scale": "u1", "super_scales": "u2", "code_scale": "f4", "code_zp": "f4"},
    4: {"quant_weight": "i1", "weight_scale": "u2"},
    8: {"quant_weight": "i1", "weight_scale": "u2"},
}


def bits_of(layer: str, last_wint4: int) -> int:
    """As FastDeploy decides: experts by their layer, every other linear WINT8."""
    found = re.search(r"layers\.(\d+)\.mlp\.experts\.", layer)
    return 8 if not found else 4 if int(found[1]) <= last_wint4 else 2


def decode(layer: str, stored: Arrays, bits: int) -> np.ndarray:
    parts = {part: stored[f"{layer}.{part}"] for part in PARTS[bits]}
    assert {part: array.dtype.str[1:] for part, array in parts.items()} == PARTS[bits]
    return decode_wint2(parts) if bits == 2 else decode_weight_only(parts, bits)


def decode_all(stored: Arrays, last_wint4: int) -> tuple[Arrays, Arrays]:
    """(decoded weights, kept tensors): every stored tensor is in one of them, and in no other."""
    layers = {name.rpartition(".")[0] for name in stored if name.endswith(".quant_weight")}
    decoded = {f"{layer}.weight": decode(layer, stored, bits_of(layer, last_wint4)) for layer in sorted(layers)}
    used = {f"{layer}.{part}" for layer in layers for part in PARTS[bits_of(layer, last_wint4)]}
    return decoded, {name: array for name, array in stored.items() if name not in used}


LAYERS = {"none": ("wint2", "--wint4-layers", 0), "one": ("wint2", "--wint4-layers", 2),
          "all": ("wint4", "--runtime", "fastdeploy"), "shared": ("wint2", "--wint4-layers", 2)}  # fmt: skip
END = {"none": -1, "one": 1, "all": LAST, "shared": 1}  # the last layer whose experts are WINT4
every_case = pytest.mark.parametrize("case", LAYERS)


def source_of(folder: Path, case: str) -> Path:
    return folder / ("src-shared" if case == "shared" else "src")


def report(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "report.json").read_text())["tensors"]}


PUBLISHED = json.loads("""{
  "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
  "moe_quant_config": {
    "quant_type": "w4w2",
    "moe_w4_quant_config": {"quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 6},
    "moe_w2_quant_config": {"quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64, "quant_start_layer": 7, "quant_end_layer": 53}}}
""")  # noqa: E501
