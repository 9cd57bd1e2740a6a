"""Write a checkpoint with the true geometry of an ERNIE 4.5 release: names, shapes, dtypes, shards, config.

python benchmarks/make_geometry.py vl-424b OUT                    # sparse files: 850 GB on paper, a few MB on disk
python benchmarks/make_geometry.py 21b OUT --layers 3 --fill      # 3 layers of real bytes (Gaussian bf16)
python benchmarks/make_geometry.py 300b OUT --layers 1 --first-moe 0 --experts 2 --fill    # a part of one of its MoE layers

Sparse tensors read as zeros. Needs numpy only; the library under test takes no part in it.
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

HEAD_DIM, VOCABULARY = 128, 103424
VISION_WIDTH, VISION_BLOCKS, VISION_FFN, PATCH_INPUTS = 1280, 32, 5120, 588
F32, BF16 = "F32", "BF16"
ITEM_BYTES = {F32: 4, BF16: 2}
STD = 0.02

Tensor = tuple[str, tuple[int, ...], str]  # name, shape, dtype


@dataclass(frozen=True)
class Geometry:
    """Sizes of one release; `experts` and `widths` have one entry per modality."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    experts: tuple[int, ...]
    widths: tuple[int, ...]
    shared: int
    first_moe: int
    tied: bool
    mtp: int
    vl: bool


# fmt: off
GEOMETRIES = {
    #                   hidden layers heads kv   ffn   experts   widths        shared first tied  mtp vl
    "0.3b":    Geometry(1024,  18,    16,   2,   3072, (),       (),           0,     18,   True,  0, False),
    "21b":     Geometry(2560,  28,    20,   4,  12288, (64,),    (1536,),      2,     1,    True,  1, False),
    "300b":    Geometry(8192,  54,    64,   8,  28672, (64,),    (3584,),      0,     3,    False, 1, False),
    "vl-28b":  Geometry(2560,  28,    20,   4,  12288, (64, 64), (1536, 512),  2,     1,    True,  0, True),
    "vl-424b": Geometry(8192,  54,    64,   8,  28672, (64, 64), (3584, 1536), 0,     3,    False, 0, True),
}
# fmt: on


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parts of one geometry in one format, in file order."""

    geometry: Geometry
    paddle: bool

    @property
    def root(self) -> str:
        """First part of most names."""
        return "ernie" if self.paddle else "model"

    def linear(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Return the stored shape of a linear: Paddle has [in, out], PT [out, in]."""
        return (inputs, outputs) if self.paddle else (outputs, inputs)

    def tensors(self, layers: int) -> Iterator[Tensor]:
        """Yield all tensors."""
        g = self.geometry
        yield f"{self.root}.embed_tokens.weight", (VOCABULARY, g.hidden), BF16
        for i in range(layers):
            prefix = f"{self.root}.layers.{i}"
            yield from self.attention(prefix)
            yield from self.norms(prefix)
            yield from self.ffn(f"{prefix}.mlp", g.ffn) if i < g.first_moe else self.moe(f"{prefix}.mlp")
        yield f"{self.root}.norm.weight", (g.hidden,), BF16
        if not g.tied:
            yield "lm_head.weight", self.linear(g.hidden, VOCABULARY), BF16
        if g.mtp:
            yield from self.mtp()
        if g.vl:
            yield from self.vision()
            yield from self.resampler()

    def attention(self, prefix: str) -> Iterator[Tensor]:
        """Yield q, k, v (fused in Paddle) and o."""
        g = self.geometry
        q, kv = g.heads * HEAD_DIM, g.kv_heads * HEAD_DIM
        if self.paddle:
            yield f"{prefix}.self_attn.qkv_proj.weight", (g.hidden, q + 2 * kv), BF16
        else:
            for name, outputs in (("q", q), ("k", kv), ("v", kv)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (outputs, g.hidden), BF16
        yield f"{prefix}.self_attn.o_proj.weight", self.linear(q, g.hidden), BF16

    def norms(self, prefix: str) -> Iterator[Tensor]:
        """Yield the two norms of a layer."""
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (self.geometry.hidden,), BF16

    def ffn(self, prefix: str, width: int) -> Iterator[Tensor]:
        """Yield gate, up (fused in Paddle) and down."""
        hidden = self.geometry.hidden
        if self.paddle:
            yield f"{prefix}.up_gate_proj.weight", (hidden, 2 * width), BF16
        else:
            for name in ("gate", "up"):
                yield f"{prefix}.{name}_proj.weight", (width, hidden), BF16
        yield f"{prefix}.down_proj.weight", self.linear(width, hidden), BF16

    def moe(self, prefix: str) -> Iterator[Tensor]:
        """Yield routers, bias, routed and shared experts."""
        g = self.geometry
        for modality, experts in enumerate(g.experts):
            name = f"{prefix}.gate.weight" + ("_1" if modality else "")
            # the releases store the routers of VL models untransposed in both formats
            yield name, (g.hidden, experts) if self.paddle or g.vl else (experts, g.hidden), F32
        yield f"{prefix}.moe_statics.e_score_correction_bias", (len(g.experts), g.experts[0]), F32
        widths = [width for experts, width in zip(g.experts, g.widths, strict=True) for _ in range(experts)]
        for i, width in enumerate(widths):
            yield from self.ffn(f"{prefix}.experts.{i}", width)
        if g.shared:
            yield from self.ffn(f"{prefix}.shared_experts", g.widths[0] * g.shared)

    def mtp(self) -> Iterator[Tensor]:
        """Yield the block that predicts the token after next."""
        hidden, prefix = self.geometry.hidden, f"{self.root}.mtp_block.0"
        yield from self.attention(prefix)
        yield from self.norms(prefix)
        yield from self.ffn(f"{prefix}.mlp", self.geometry.ffn)
        for name in ("mtp_emb_norm", "mtp_hidden_norm"):
            yield f"{self.root}.{name}.0.weight", (hidden,), BF16
        yield f"{self.root}.mtp_linear_proj.0.weight", self.linear(2 * hidden, hidden), BF16

    def biased(self, prefix: str, inputs: int, outputs: int) -> Iterator[Tensor]:
        """Yield a linear with a bias."""
        yield f"{prefix}.weight", self.linear(inputs, outputs), BF16
        yield f"{prefix}.bias", (outputs,), BF16

    def layer_norm(self, prefix: str, width: int) -> Iterator[Tensor]:
        """Yield a norm with a bias."""
        for name in ("weight", "bias"):
            yield f"{prefix}.{name}", (width,), BF16

    def vision(self) -> Iterator[Tensor]:
        """Yield the vision tower."""
        width = VISION_WIDTH
        yield "vision_model.patch_embed.proj.weight", self.linear(PATCH_INPUTS, width), BF16
        for i in range(VISION_BLOCKS):
            prefix = f"vision_model.blocks.{i}"
            yield from self.biased(f"{prefix}.attn.qkv", width, 3 * width)
            yield from self.biased(f"{prefix}.attn.proj", width, width)
            yield from self.biased(f"{prefix}.mlp.fc1", width, VISION_FFN)
            yield from self.biased(f"{prefix}.mlp.fc2", VISION_FFN, width)
            yield from self.layer_norm(f"{prefix}.norm1", width)
            yield from self.layer_norm(f"{prefix}.norm2", width)
        yield from self.layer_norm("vision_model.ln", width)

    def resampler(self) -> Iterator[Tensor]:
        """Yield what merges 2x2 patches, then 2 frames, and projects them to the language model."""
        prefix, width, hidden = f"{self.root}.resampler_model", 4 * VISION_WIDTH, self.geometry.hidden
        for part, inputs in (("spatial_linear", width), ("temporal_linear", 2 * width)):
            yield from self.biased(f"{prefix}.{part}.0", inputs, width)
            yield from self.biased(f"{prefix}.{part}.2", width, width)
            yield from self.layer_norm(f"{prefix}.{part}.3", width)
        yield from self.biased(f"{prefix}.mlp", width, hidden)
        yield f"{prefix}.after_norm.weight", (hidden,), BF16


def config(g: Geometry, layers: int, paddle: bool) -> dict:
    """Return config.json."""
    if g.vl:
        architecture, model_type = "Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_moe_vl"
    elif g.experts:
        architecture, model_type = "Ernie4_5_MoeForCausalLM", "ernie4_5_moe"
    else:
        architecture, model_type = "Ernie4_5_ForCausalLM" if paddle else "Ernie4_5ForCausalLM", "ernie4_5"
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": g.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": g.ffn,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": g.tied,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "use_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype" if paddle else "torch_dtype": "bfloat16",
        **(moe_config(g, layers) if g.experts else {}),
        **(vision_config() if g.vl else {}),
    }


def moe_config(g: Geometry, layers: int) -> dict:
    """Return the MoE part of config.json; VL models have lists of one value per modality."""

    def per_modality(values: tuple[int, ...]) -> list[int] | int:
        return list(values) if g.vl else values[0]

    return {
        "moe_num_experts": per_modality(g.experts),
        "moe_intermediate_size": per_modality(g.widths),
        "moe_k": min(8 if g.hidden == 8192 else 6, *g.experts),
        "moe_num_shared_experts": g.shared,
        "moe_layer_start_index": per_modality((g.first_moe, g.first_moe)),
        "moe_layer_end_index": per_modality((layers - 1, layers - 1)),
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": g.mtp,
    }


def vision_config() -> dict:
    """Return the vision part of config.json."""
    return {
        "pixel_hidden_size": VISION_WIDTH,
        "im_patch_id": 100295,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "vision_config": {
            "depth": VISION_BLOCKS,
            "embed_dim": VISION_WIDTH,
            "hidden_size": VISION_WIDTH,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "in_channels": 3,
            "spatial_merge_size": 2,
        },
    }


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's data."""
    _, shape, dtype = tensor
    return math.prod(shape) * ITEM_BYTES[dtype]


def into_shards(tensors: Iterator[Tensor], max_bytes: float) -> list[list[Tensor]]:
    """Distribute tensors over shards in order."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor_bytes(tensor) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor_bytes(tensor)
    return shards


def header(shard: list[Tensor], metadata_format: str, bf16_tag: str) -> bytes:
    """Return the safetensors header with its length."""
    entries: dict[str, dict] = {"__metadata__": {"format": metadata_format}}
    at = 0
    for tensor in shard:
        name, shape, dtype = tensor
        end = at + tensor_bytes(tensor)
        tag = bf16_tag if dtype == BF16 else dtype
        entries[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class Filler:
    """Cheap Gaussian bytes: bf16 tensors are windows at random places of one tile of 16.8 million values."""

    def __init__(self, seed: int) -> None:
        """Draw the tile."""
        self.rng = np.random.default_rng(seed)
        bits = (self.rng.standard_normal(1 << 24, dtype=np.float32) * STD).view(np.uint32)
        # round to nearest even
        self.tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def chunks(self, tensor: Tensor) -> Iterator[memoryview | bytes]:
        """Yield the bytes of one tensor. Norms are 1 and biases of routers 0, so that tokens spread over the experts."""
        name, shape, dtype = tensor
        left = math.prod(shape)
        if name.endswith(("layernorm.weight", ".norm.weight")):
            yield np.full(left, 0x3F80, np.uint16).data
        elif name.endswith("e_score_correction_bias"):
            yield bytes(4 * left)
        elif dtype == F32:
            yield (self.rng.standard_normal(left, dtype=np.float32) * STD).data
        else:
            yield from self.windows(left)

    def windows(self, left: int) -> Iterator[memoryview]:
        """Yield so many values of the tile."""
        while left:
            start = int(self.rng.integers(0, self.tile.size // 2))
            count = min(left, self.tile.size - start)
            yield self.tile[start : start + count].data
            left -= count


def write_shard(path: Path, head: bytes, shard: list[Tensor], filler: Filler | None) -> None:
    """Write one file, sparse without a filler."""
    with path.open("wb") as file:
        file.write(head)
        if filler is None:
            file.truncate(len(head) + sum(map(tensor_bytes, shard)))
            return
        for tensor in shard:
            for chunk in filler.chunks(tensor):
                file.write(chunk)


def write_checkpoint(args: argparse.Namespace) -> str:
    """Write all files and return one line about them."""
    g, paddle = GEOMETRIES[args.model], args.format == "paddle"
    if args.experts:
        g = replace(g, experts=(args.experts,) * len(g.experts))
    if args.first_moe is not None:
        g = replace(g, first_moe=args.first_moe)
    layers = args.layers or g.layers
    shards = into_shards(Layout(g, paddle).tensors(layers), args.shard_gb * 1e9)
    filler = Filler(args.seed) if args.fill else None
    args.out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        head = header(shard, *(("np", args.bf16_tag) if paddle else ("pt", BF16)))
        write_shard(args.out / file, head, shard, filler)
        weight_map |= {name: file for name, _, _ in shard}
    total = sum(tensor_bytes(tensor) for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (args.out / "config.json").write_text(json.dumps(config(g, layers, paddle), indent=2))
    return f"{args.model} {args.format}: {len(weight_map)} tensors, {total / 1e9:.1f} GB, {len(shards)} shards, {layers} layers"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=GEOMETRIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="default: all of the release's")
    parser.add_argument("--experts", type=int, help="of each modality; default: the release's")
    parser.add_argument("--first-moe", type=int, help="first layer with experts; default: the release's")
    parser.add_argument("--format", default="paddle", choices=["paddle", "pt"])
    parser.add_argument("--fill", action="store_true", help="write real bytes")
    parser.add_argument("--shard-gb", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16-tag", default="U16", choices=["U16", "BF16"], help="paddle's name of bf16")
    return parser.parse_args()


if __name__ == "__main__":
    print(write_checkpoint(parse_args()))
