"""Small checkpoints made on the fly: files of every format, and models derived from the golden ones."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings

from ernie_quant.dtypes import dtype_name
from ernie_quant.readers import read_header
from ernie_quant.views import build, read
from ernie_quant.views import files as views_files
from helpers.paths import GOLDEN

Tensors = Mapping[str, torch.Tensor]


def quick(examples: int) -> settings:
    """The same examples every time, and no clock."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


def payload(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def exact(tensors: Tensors) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensors as values that `==` compares bit by bit, NaN and -0 included."""
    return {name: (dtype_name(t.dtype), tuple(t.shape), payload(t)) for name, t in tensors.items()}


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, by this project's readers."""
    with views_files.Files() as files:
        return {ref.name: read.read(build.leaf(ref), files) for ref in read_header(path)}


# --- files -----------------------------------------------------------------------------------------------------------


def write_raw_safetensors(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A header as it is, true or not, and what follows it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, bf16: str = "BF16") -> Path:
    """Tensors one after the other; `bf16="U16"` is the tag of release-era Paddle files."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        tag = bf16 if tensor.dtype == torch.bfloat16 else dtype_name(tensor.dtype)
        header[name] = {"dtype": tag, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    return write_raw_safetensors(path, header, b"".join(payload(t) for t in tensors.values()))


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As Paddle pickles it: bfloat16 bits as u2."""
    return tensor.contiguous().view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def write_pdparams(path: Path, tensors: Tensors, protocol: int = 4, split_above: int | None = None) -> Path:
    """`paddle.save` of a state dict; arrays of more than `split_above` elements are cut as protocols 2 and 3 cut them."""
    table: dict[str, Any] = {}
    split: dict[str, Any] = {}
    for name, tensor in tensors.items():
        whole = array(tensor)
        if split_above is None or whole.size <= split_above:
            table[name] = whole
            continue
        flat = whole.flatten()
        slices = {f"{name}@@.{i}": flat[at : at + split_above] for i, at in enumerate(range(0, flat.size, split_above))}
        split[name] = {"OriginShape": whole.shape, "slices": list(slices)}
        table |= slices
    table["StructuredToParameterName@@"] = {name: f"linear_{i}.w_0" for i, name in enumerate(tensors)}
    if split:
        table["UnpackBigParamInfor@@"] = split
    path.write_bytes(pickle.dumps(table, protocol))
    return path


def write_bin(path: Path, tensors: Mapping[str, Any]) -> Path:
    """`torch.save` of a state dict."""
    torch.save(dict(tensors), path)
    return path


# --- models ----------------------------------------------------------------------------------------------------------


@cache
def golden(model: str, layout: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of a golden checkpoint; do not change them, make new dicts."""
    from safetensors.torch import load_file

    folder = GOLDEN / model / layout
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    bits = {name: t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for name, t in tensors.items()}
    return json.loads((folder / "config.json").read_text()), bits


def write_model(folder: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 1, bf16: str = "BF16") -> Path:
    """A folder of safetensors: one file, or `shards` of them with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, bf16)
        return folder
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        mine, file = names[i::shards], f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {n: tensors[n] for n in mine}, {"format": "pt"}, bf16)
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.nbytes for t in tensors.values())
    write_index(folder, weight_map, total)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any], total_bytes: int = 0) -> None:
    """model.safetensors.index.json."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tiny(name: str = "moe", layout: str = "pt", **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A golden model to be altered: copies of its dicts, with `changes` to config.json (None removes a key)."""
    config, tensors = golden(name, layout)
    merged = {**config, **changes}
    return {key: value for key, value in merged.items() if changes.get(key, 0) is not None}, dict(tensors)


def wide() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A PT model of random weights whose widths are multiples of 128: 2 layers, the second with 2 experts of width 128."""
    config, _ = tiny(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=2, moe_layer_start_index=1, moe_layer_end_index=1, moe_num_experts=2, moe_num_shared_experts=0, moe_k=1,
        vocab_size=64,
    )  # fmt: skip
    shapes = {"model.embed_tokens.weight": (64, 128), "model.norm.weight": (128,)}
    for i in (0, 1):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.{x}_layernorm.weight": (128,) for x in ("input", "post_attention")}
        shapes |= {f"{p}.self_attn.{x}_proj.weight": (n, 128) for x, n in (("q", 128), ("k", 64), ("v", 64), ("o", 128))}
    for p, width in (("0.mlp", 256), ("1.mlp.experts.0", 128), ("1.mlp.experts.1", 128)):
        shapes |= {f"model.layers.{p}.{x}_proj.weight": (width, 128) for x in ("gate", "up")}
        shapes[f"model.layers.{p}.down_proj.weight"] = (128, width)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    tensors["model.layers.1.mlp.gate.weight"] = torch.randn(2, 128, generator=generator)
    tensors["model.layers.1.mlp.moe_statics.e_score_correction_bias"] = torch.zeros(1, 2)
    return config, tensors


def rank_share(name: str, tensor: torch.Tensor, rank: int, ranks: int, kv_share: float) -> torch.Tensor:
    """What a tensor-parallel rank holds of a Paddle tensor; `kv_share` is the part of qkv_proj's outputs that k has."""

    def share(t: torch.Tensor, axis: int) -> torch.Tensor:
        return t.chunk(ranks, axis)[rank]

    if re.search(r"(qkv_proj|up_gate_proj)\.weight$", name):
        if "qkv" in name:
            kv = round(tensor.shape[1] * kv_share)
            pieces: Sequence[torch.Tensor] = tensor.split([tensor.shape[1] - 2 * kv, kv, kv], 1)
        else:
            pieces = tensor.chunk(2, 1)
        return torch.cat([share(p, 1) for p in pieces], 1)
    if re.search(r"(o_proj|down_proj|embed_tokens)\.weight$", name):
        return share(tensor, 0)
    return tensor


def write_ranks(folder: Path, name: str, ranks: int) -> Path:
    """A golden Paddle model (tied embeddings) as the -TP repositories hold it: rank0/, rank1/, …"""
    config, tensors = golden(name, "paddle")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_share = kv_heads / (heads + 2 * kv_heads)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        mine = {n: rank_share(n, t, rank, ranks, kv_share) for n, t in tensors.items() if n != "lm_head.weight"}
        (folder / f"rank{rank}").mkdir()
        write_safetensors(folder / f"rank{rank}" / "model.safetensors", mine, {"format": "np"}, "U16")
    return folder
