"""The mathematics of one decoder layer in float32, a few lines each, so that a layer never has to be whole in memory.

Held to transformers' `ernie4_5`, `ernie4_5_moe` and `ernie4_5_vl_moe` (text tokens) by tests/calibration. Weights are
[out, in]; H hidden, Q heads * head_dim, KV kv_heads * head_dim, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from ernie_quant.calibration.integers import Cache, Rounding


class Linear(NamedTuple):
    """A weight [out, in] and its bias [out], if it has one. `rounds`: what its kernel does to inputs, if anything."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rounds: Rounding | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        out = (x if self.rounds is None else self.rounds(x)) @ self.weight.T
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Attention:
    """What attention does with q, k and v."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_factor: float  # positions are divided by it

    @property
    def kv_channels(self) -> int:
        """Of all keys of a token; as many of its values."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Routing:
    """How experts are chosen."""

    experts: int
    top_k: int
    norm_min: float  # least sum that routing weights are divided by


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H]."""
    import torch

    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotated(x: torch.Tensor, shape: Attention) -> torch.Tensor:
    """RoPE of [windows, heads, tokens, head_dim]: neighbouring channels are a pair; every window begins at position 0.

    A text token of a VL model has the same position on its three axes, which makes 3D RoPE this one.
    """
    import torch

    dim, tokens = x.shape[-1], x.shape[-2]
    frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = (torch.arange(tokens, dtype=torch.float32) / shape.rope_factor)[:, None] * frequencies
    cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + turned * sin


def heads(x: torch.Tensor, shape: Attention) -> torch.Tensor:
    """[windows, tokens, heads * head_dim] -> [windows, heads, tokens, head_dim]."""
    return x.view(*x.shape[:-1], -1, shape.head_dim).transpose(1, 2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Attention, cache: Cache | None = None
) -> torch.Tensor:  # fmt: skip
    """The input of o_proj [windows, tokens, Q], from q [windows, tokens, Q], k and v [windows, tokens, KV]; causal.

    `cache`: what every key and value goes through, that of the token itself too.
    """
    import torch

    keys, values = rotated(heads(k, shape), shape), heads(v, shape)
    if cache is not None:
        keys, values = cache.keys(keys), cache.values(values)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        rotated(heads(q, shape), shape),
        keys,
        values,
        is_causal=True,
        enable_gqa=shape.heads != shape.kv_heads,
    )
    return mixed.transpose(1, 2).flatten(2)


def gated(x: torch.Tensor, gate: Linear, up: Linear) -> torch.Tensor:
    """The input of down_proj, silu(gate(x)) * up(x)."""
    import torch

    return torch.nn.functional.silu(gate(x)) * up(x)


def route(x: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None, shape: Routing) -> torch.Tensor:
    """Routing weights [tokens, E], zero where an expert is not asked, of x [tokens, H]; router [E, H], bias [E].

    The bias decides who is asked and not how much is heard.
    """
    import torch

    likely = torch.softmax(x @ router.T, -1)
    chosen = torch.topk(likely if bias is None else likely + bias, shape.top_k, dim=-1).indices
    heard = likely.gather(-1, chosen)
    heard = heard / heard.sum(-1, keepdim=True).clamp(min=shape.norm_min)
    return torch.zeros_like(likely).scatter_(-1, chosen, heard)
