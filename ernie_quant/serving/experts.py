"""Routed WINT2 experts, one after the other: decoded, multiplied with, dropped. What `experts_triton` is held to."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ernie_quant import kernels
from ernie_quant.kernels import ccq_reference
from ernie_quant.runtimes import _wint2


class Stored(NamedTuple):
    """A projection of all experts: uint8 [E, N, K/4], uint8 [E, N, K/128] and float32 [E, N, 3], as in runtimes/_wint2."""

    packed: torch.Tensor
    local: torch.Tensor
    channel: torch.Tensor


def weight(stored: Stored, expert: int) -> torch.Tensor:
    """bf16 [N, K] of one expert."""
    fields = _wint2.fields(*(part[expert] for part in stored))
    if fields["codes"].device.type == "cpu" or find_spec("triton") is not None:
        decoded: torch.Tensor = kernels.of("ccq", fields["codes"]).decode(fields)
        return decoded
    return ccq_reference.decode(fields)


def products(x: torch.Tensor, gate_up: Stored, down: Stored, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) of each token's experts, weighted and added in float32: bf16 [T, H] of bf16 [T, H].

    topk_weights float32 [T, n], topk_ids [T, n]: places in the stored tensors, -1 for an expert that lies on another rank.
    Reads the ids: no CUDA graph holds it.
    """
    total, chosen = torch.zeros_like(x, dtype=torch.float32), set(topk_ids.flatten().tolist())
    for expert in (place for place in range(len(gate_up.packed)) if place in chosen):
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], weight(gate_up, expert)).float().chunk(2, -1)
        out = F.linear((F.silu(gate) * up).to(x.dtype), weight(down, expert))
        total.index_add_(0, token, out.float() * topk_weights[token, choice, None].float())
    return total.to(x.dtype)
