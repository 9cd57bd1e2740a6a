"""WINT2 experts on a CPU: what is decoded expert by expert is the layer that plain weights make."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ernie_quant.codecs.ccq import ConvolutionalCode
from ernie_quant.kernels import ccq_reference
from ernie_quant.runtimes import _wint2
from ernie_quant.serving import experts
from ernie_quant.serving.experts import Stored

TOKENS, HIDDEN, WIDTH, COUNT = 5, 128, 256, 3


def made(rows: int, width: int, seed: int) -> tuple[Stored, list[torch.Tensor]]:
    """Experts as they are stored, and what the plain decoder makes of them."""
    random, codec = torch.Generator().manual_seed(seed), ConvolutionalCode(1)
    encoded = [codec.encode((torch.randn((rows, width), generator=random) / width**0.5).bfloat16()) for _ in range(COUNT)]
    parts = [_wint2.pack("w", fields) for fields in encoded]
    stored = Stored(*(torch.stack([part[f"w.{name}"] for part in parts]) for name in
                      ("weight_packed", "weight_scale", "weight_channel_scale")))  # fmt: skip
    return stored, [ccq_reference.decode(fields) for fields in encoded]


def test_a_layer() -> None:
    (gate_up, plain), (down, plain_down) = made(2 * WIDTH, HIDDEN, 1), made(HIDDEN, WIDTH, 2)
    random = torch.Generator().manual_seed(3)
    x, weights = torch.randn((TOKENS, HIDDEN), generator=random).bfloat16(), torch.rand((TOKENS, 2), generator=random)
    ids = torch.tensor([[0, 2], [2, 0], [0, 2], [-1, 2], [-1, -1]])  # nobody wants 1; -1 lies on another rank
    found = experts.products(x, gate_up, down, weights, ids)
    wanted = torch.zeros((TOKENS, HIDDEN), dtype=torch.float64)
    for token, choice in ((ids >= 0).nonzero()).tolist():
        expert = int(ids[token, choice])
        gate, up = (plain[expert].double() @ x[token].double()).bfloat16().float().chunk(2)
        out = plain_down[expert].double() @ (F.silu(gate) * up).bfloat16().double()
        wanted[token] += out * weights[token, choice]
    assert found.dtype == torch.bfloat16
    assert not found[4].any()
    assert (found.double() - wanted).abs().max() <= wanted.abs().max() / 64
    assert wanted[:4].abs().amax(1).min() > 0.1
