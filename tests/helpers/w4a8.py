"""FastDeploy's W4A8C8 container: a decoder and its kernels' products, of numpy and the specification alone; small results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ernie_quant.planning.built_in import make
from ernie_quant.planning.make import make_plan
from ernie_quant.readers.safetensors import read_header
from ernie_quant.run.whole import run_plan
from ernie_quant.sources import open_source
from ernie_quant.views.build import leaf
from ernie_quant.views.kinds import View
from helpers.bits import F, bf16
from helpers.calibrated import calibrated
from helpers.containers import Arrays, decode_weight_only, read_file, widened
from helpers.models import random_model
from helpers.words import byte_tokenizer

# H 256, Q 512, KV 128, I 512, M 512: with 4 ranks every one has 128 inputs of each down_proj, and 2 share a kv head
WIDTHS: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "moe_num_experts": 2, "moe_num_shared_experts": 1, "moe_k": 1, "vocab_size": 256,
}  # fmt: skip
KV_HEADS, HEAD_DIM, BLOCK = 2, 64, 128
DOWN, UP = "ernie.layers.2.mlp.experts.1.down_proj", "ernie.layers.2.mlp.experts.1.up_gate_proj"
QKV = "ernie.layers.2.self_attn.qkv_proj"
KEYS, VALUES = (f"ernie.layers.2.self_attn.cache{x}_matmul.activation_scale" for x in "kv")


def model(folder: Path, family: str = "moe", layout: str = "paddle", **changes: Any) -> Path:
    """A random one with a tokenizer of bytes."""
    return byte_tokenizer(random_model(folder, layout, family, **{**WIDTHS, **changes}))


def quantized(source: Path, out: Path, *options: object, method: str = "nearest") -> Path:
    return calibrated(source, out, *options or ("--scale", "mse"), command="w4a8", method=method)


def with_statistics(source: Path, out: Path) -> Path:
    """Of statistics that are given: codes nearest to the weights, activation scales 1, 2, …, those of a cache .5, 1.5, …"""
    table: dict[str, torch.Tensor] = {}
    for number, name in enumerate(n for n in read_file(source / "model.safetensors") if n.endswith("_proj.weight")):
        if ".experts." in name:
            table[f"{name} largest"] = torch.tensor([1.0 + number])
        elif ".qkv_proj." in name and ".layers." in name:
            table |= {f"{name} largest_{kind}": torch.arange(KV_HEADS * HEAD_DIM) + 0.5 for kind in ("key", "value")}
    file = out.with_name("statistics.safetensors")
    save_file(table, file)
    statistics: dict[str, dict[str, View]] = {}
    for ref in read_header(file):
        name, kind = ref.name.split(" ")
        statistics.setdefault(name, {})[kind] = leaf(ref)
    run_plan(make_plan(open_source(source), runtime="fastdeploy", recipe=make("w4a8").recipe, statistics=statistics), out)
    return out


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotated(rows: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """H times every `block` rows of [K, …], float64."""
    blocks = rows.astype(np.float64).reshape(-1, block, *rows.shape[1:])
    return np.einsum("ij,bj...->bi...", hadamard(block), blocks).reshape(rows.shape)


def codes(packed: np.ndarray) -> np.ndarray:
    """[K, N] of int8 [K / 2, N]: two's complement, row 2j in the low nibble."""
    nibbles = np.stack([packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4], 1).reshape(-1, packed.shape[1]).astype(int)
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def decode(layer: str, stored: Arrays, block: int = BLOCK) -> np.ndarray:
    """[K, N] of a linear, bf16: the scale is what code 7 stands for, and down_proj is turned back by H."""
    parts = {part: stored[f"{layer}.{part}"] for part in ("quant_weight", "weight_scale")}
    if ".experts." not in layer:
        return decode_weight_only(parts, 8)
    scale = (parts["weight_scale"] / F(7)).astype(F)
    weight = codes(parts["quant_weight"]).astype(F) * scale
    return bf16((rotated(weight, block) if layer.endswith("down_proj") else weight).astype(F))


def product(layer: str, stored: Arrays, inputs: np.ndarray) -> np.ndarray:
    """What the loader and the kernel make of f64 inputs [tokens, K]: [tokens, N].

    in_scale = 1 / activation_scale; weight_scale / (127 * 112) / in_scale in bf16; q = round(127 in_scale x) of the rotated
    inputs of down_proj; codes stand in the upper half of a byte, times 16.
    """
    in_scale = 1 / stored[f"{layer}.activation_scale"].astype(F)
    scale = bf16((stored[f"{layer}.weight_scale"] / F(127 * 112) / in_scale).astype(F))
    seen = rotated(inputs.T).T if layer.endswith("down_proj") else inputs
    q = np.clip(np.trunc(127 * in_scale * seen + np.copysign(0.5, seen)), -127, 127)
    return (q @ (16.0 * codes(stored[f"{layer}.quant_weight"]))) * scale


def plain(weight: np.ndarray) -> np.ndarray:
    """f32 of a kept one."""
    return widened(weight) if weight.dtype == np.uint16 else weight.astype(F)
