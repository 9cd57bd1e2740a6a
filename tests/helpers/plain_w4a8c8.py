"""A mixture of experts with 8-bit activations of experts and an 8-bit KV cache, in a page of plain torch, one window at a time.

Written from what FastDeploy's sources say (PaddlePaddle/FastDeploy: custom_ops/gpu_ops/moe/fused_moe_op.h and moe_ffn.cu, routing
weights after down_proj; append_attn/utils.cuh; quantization/kv_cache.py), float32 but for what they round. Nothing of it is
ernie_quant's: weights are plain, by their PT names, and scales have the names that lie in the file.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
BLOCK = 128  # that the Hadamard transform of down_proj's inputs goes over


class PlainModel:
    """`scales`: stored tensors called `….activation_scale`; without them it computes with floats alone.

    `largest`: the largest magnitude of what is rounded, by the name of its scale; `sources`: weights that keys and values are
    measured by, if others than the model's.
    """

    def __init__(self, config: dict[str, Any], weights: Tensors, scales: Tensors | None = None, sources: Tensors | None = None):
        self.config, self.weights, self.scales = config, weights, scales or {}
        self.sources = weights if sources is None else sources
        self.largest: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(1))
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] of one window of ids."""
        h = self.weights["model.embed_tokens.weight"].float()[ids]
        for layer in range(self.config["num_hidden_layers"]):
            h = self.through(layer, h)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.normed(h, "model.norm") @ head.float().T + self.weights.get("lm_head.bias", torch.zeros(())).float()

    def through(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Hidden states [tokens, H] one layer further."""
        h = h + self.attention(layer, self.normed(h, f"model.layers.{layer}.input_layernorm"))
        x = self.normed(h, f"model.layers.{layer}.post_attention_layernorm")
        routed = f"model.layers.{layer}.mlp.gate.weight" in self.weights
        return h + (self.experts(layer, x) if routed else self.ffn(f"model.layers.{layer}.mlp", x))

    def normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gains = self.weights[f"{name}.weight"].float()
        return gains * x / (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, dim]; neighbours are a complex number that is turned."""
        speed = self.config["rope_theta"] ** -(torch.arange(0, self.dim, 2).double() / self.dim)
        turn = torch.polar(torch.ones(()).double(), torch.arange(len(x)).double()[:, None] * speed)[:, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).float()

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        place = f"model.layers.{layer}.self_attn"

        def of(name: str, weights: Tensors) -> torch.Tensor:
            return (x @ weights[f"{place}.{name}_proj.weight"].float().T).unflatten(-1, (-1, self.dim))

        q, k, v = self.rope(of("q", self.weights)), self.rope(of("k", self.weights)), of("v", self.weights)
        measured = {"cachek_matmul": self.rope(of("k", self.sources)), "cachev_matmul": of("v", self.sources)}
        for point, cached in measured.items():
            name = f"ernie.layers.{layer}.self_attn.{point}.activation_scale"
            self.largest[name] = torch.maximum(self.largest[name], cached.flatten(1).abs().amax(0))
        k, v = self.cached(layer, "cachek_matmul", k), self.cached(layer, "cachev_matmul", v)
        mixed, hidden = [], torch.ones(len(x), len(x)).triu(1).bool()
        for head in range(self.heads):
            of_kv = head * self.kv_heads // self.heads
            scores = q[:, head] @ k[:, of_kv].T / self.dim**0.5
            mixed.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, of_kv])
        return torch.cat(mixed, -1) @ self.weights[f"{place}.o_proj.weight"].float().T

    def cached(self, layer: int, point: str, x: torch.Tensor) -> torch.Tensor:
        """[tokens, kv heads, dim] as an int8 cache gives it back; its loader has both factors in bfloat16."""
        scale = self.scales.get(f"ernie.layers.{layer}.self_attn.{point}.activation_scale")
        if scale is None:
            return x
        s = scale.bfloat16().view(self.kv_heads, self.dim)
        codes = torch.round(x * (127 / s).float()).clip(-127, 127)
        return codes * (s / 127).float()

    def experts(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        place, stored = f"model.layers.{layer}.mlp", f"ernie.layers.{layer}.mlp"
        likely = (x @ self.weights[f"{place}.gate.weight"].float().T).softmax(-1)
        bias = self.weights.get(f"{place}.moe_statics.e_score_correction_bias", torch.zeros(1, 1))
        said = torch.zeros_like(x)
        for token, row in enumerate((likely + bias).topk(self.config["moe_k"], -1).indices.tolist()):
            total = max(sum(float(likely[token, e]) for e in row), 1e-12)
            for expert in row:
                one = x[token : token + 1]
                of = self.ffn(f"{place}.experts.{expert}", one, f"{stored}.experts.{expert}")
                said[token] += likely[token, expert] / total * of[0]
        shared = f"{place}.shared_experts"
        return said + self.ffn(shared, x) if f"{shared}.gate_proj.weight" in self.weights else said

    def ffn(self, place: str, x: torch.Tensor, stored: str = "") -> torch.Tensor:
        """`stored`: where the scales of a routed expert lie."""
        gate, up, down = (self.weights[f"{place}.{name}_proj.weight"].float() for name in ("gate", "up", "down"))
        x = self.rounded(x, f"{stored}.up_gate_proj", 1) if stored else x
        inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        return (self.rounded(inner, f"{stored}.down_proj", BLOCK) if stored else inner) @ down.T

    def rounded(self, x: torch.Tensor, stored: str, block: int) -> torch.Tensor:
        """[tokens, in] through 8 bits, of what a Hadamard transform in bfloat16 makes of every `block` inputs, and back."""
        turned, name = hadamard(x.bfloat16(), block).float(), f"{stored}.activation_scale"
        self.largest[name] = torch.maximum(self.largest[name], turned.abs().max().reshape(1))
        if name not in self.scales:
            return x
        scale = float(self.scales[name])
        wanted = (turned * (127 / scale)).clip(-127, 127)
        codes = torch.where(wanted < 0, (wanted - 0.5).ceil(), (wanted + 0.5).floor())  # half away from zero
        return hadamard(codes * (scale / 127), block) / block


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Every `block` columns times the +-1 matrix of Sylvester, in the dtype of x."""
    step = 1
    while step < block:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return x
