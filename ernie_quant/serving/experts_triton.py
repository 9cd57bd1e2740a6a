"""Routed WINT2 experts on a GPU: one product for all experts of a layer, whose weights are decoded in registers.

A program multiplies up to TOKENS tokens of one expert with COLUMNS of its outputs. 32 bytes of a column are 128 inputs: two
groups of 64, and 4 values to a byte. Value i of byte j of a group belongs to input 16 (j % 4) + 2 (j / 4) + i % 2 + 8 (i / 2)
(ccq_reference.stored_order), so bytes of four columns would meet inputs that lie apart. `planes` puts inputs in the order in
which values come: first value 0 of all 32 bytes, then value 1, 2 and 3, each a product of its own. Weights are never moved.

The weights are those of `ccq.decode` to the bit; products are summed as tensor cores do, so results are not to the bit those
of `experts.products`. What a decoder must not leave to a compiler: the 15 bits of a byte are one fused multiply-add and
one sum (contraction is off for the rest), products are rounded to bf16, half to even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ernie_quant.kernels._triton import cdiv, jit, launch, round_bf16
from ernie_quant.serving.experts import Stored

BYTES, INPUTS = 32, 128  # of a column, at a time
MAGIC = tl.constexpr(0x4B000000)  # float32 2^23: or'ed with a small integer it is 2^23 + the integer, without a conversion
LANES = 256  # of an elementwise program

Align = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Tile(NamedTuple):
    """What a program takes."""

    tokens: int
    columns: int
    warps: int


FEW, MANY = Tile(16, 64, 4), Tile(64, 128, 8)


def tile_for(choices: int, experts: int) -> Tile:
    """By how many tokens an expert has on average."""
    return FEW if choices <= 16 * experts else MANY


def products(
    x: torch.Tensor,
    gate_up: Stored,
    down: Stored,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    align: Align,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """`experts.products`, but for the ids: topk_ids count all experts, and expert_map says where they lie here, or -1.

    `align(ids, block)` gives what `grouping.aligned` gives; experts of blocks may be -1. Nothing is read back from the GPU.
    """
    tokens, top = topk_ids.shape
    tile = tile_for(topk_ids.numel(), len(gate_up.packed) if expert_map is None else len(expert_map))
    blocks = align(topk_ids, tile.tokens)
    hidden = multiplied(planes(x), gate_up, blocks, tokens * top, top, tile)
    out = multiplied(gated(hidden), down, blocks, tokens * top, 1, tile)
    here = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    return summed(out.view(tokens, top, -1), topk_weights, here)


def planes(x: torch.Tensor) -> torch.Tensor:
    """[T, K] with inputs in the order of `_product`: of 128 the 32 that meet values 0, then those of values 1, 2 and 3."""
    # an input is 128 a + 64 group + 16 low + 8 second + 2 high + first; j = 4 high + low, i = 2 second + first
    return x.reshape(len(x), -1, 2, 4, 2, 4, 2).permute(0, 1, 4, 6, 2, 5, 3).reshape(x.shape)


def multiplied(
    x: torch.Tensor, stored: Stored, blocks: tuple[torch.Tensor, ...], choices: int, top: int, tile: Tile
) -> torch.Tensor:
    """bf16 [choices, N]: rows of x, in the order of `planes`, times the weights of their experts; row of a choice: / top.

    Rows of choices whose expert is -1 are not written.
    """
    sorted_ids, expert_ids, used = blocks
    _, columns, quarter = stored.packed.shape
    out = torch.empty((choices, columns), dtype=torch.bfloat16, device=x.device)
    grid = (cdiv(columns, tile.columns), len(expert_ids))
    interpreted = x.device.type == "cpu"
    sizes = (choices, columns, 4 * quarter, top, tile.tokens, tile.columns)
    launch(_product, grid, x, *stored, sorted_ids, expert_ids, used, out, *sizes, interpreted, num_warps=tile.warps)
    return out


def gated(hidden: torch.Tensor) -> torch.Tensor:
    """bf16 [n, I] in the order of `planes`: silu(gate) * up of bf16 [n, 2 I]."""
    rows, width = hidden.shape[0], hidden.shape[1] // 2
    out = torch.empty((rows, width), dtype=hidden.dtype, device=hidden.device)
    launch(_gated, (rows, cdiv(width, LANES)), hidden, out, width, LANES, hidden.device.type == "cpu")
    return out


def summed(out: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """bf16 [T, H]: the weighted sum of bf16 [T, n, H] over n, in float32; none of those whose id is -1."""
    tokens, top, hidden = out.shape
    total = torch.empty((tokens, hidden), dtype=out.dtype, device=out.device)
    grid = (tokens, cdiv(hidden, LANES))
    launch(
        _summed, grid, out, topk_weights.float().contiguous(), topk_ids.contiguous(), total, hidden, top, LANES,
        out.device.type == "cpu",
    )  # fmt: skip
    return total


@jit
def _bf16(x, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Half to even, which the instruction does and the interpreter does not."""
    return (round_bf16(x) if INTERPRETED else x).to(tl.bfloat16)


@jit
def _codes(byte, code_scale, code_zero, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 15 bits of a byte; float64 is a fused multiply-add where there is none."""
    if INTERPRETED:
        code = (byte.to(tl.float64) * code_scale.to(tl.float64) + code_zero.to(tl.float64)).to(tl.float32)
    else:
        code = tl.fma((byte.to(tl.int32) | MAGIC).to(tl.float32, bitcast=True) - 8388608.0, code_scale, code_zero)
    return tl.floor(code + 0.5).to(tl.int32)


@triton.jit(do_not_specialize=["choices"])  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, packed, local, channel, sorted_ids, expert_ids, used, out, choices, columns, width,
    TOP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    if block * TOKENS >= tl.load(used):
        return
    expert = tl.load(expert_ids + block).to(tl.int64)
    if expert < 0:
        return
    choice = tl.load(sorted_ids + block * TOKENS + tl.arange(0, TOKENS))
    taken = choice < choices
    j = tl.arange(0, 32)
    inputs = x + (choice // TOP).to(tl.int64)[:, None] * width + j[None, :]

    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    row = expert * columns + tl.where(there, column, 0)
    super_scale, code_scale, code_zero = (
        tl.load(channel + 3 * row),
        tl.load(channel + 3 * row + 1),
        tl.load(channel + 3 * row + 2),
    )
    bytes_ = packed + row[None, :] * (width // 4) + j[:, None]
    scales = local + row * (width // 128)

    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for step in range(0, width // 128):
        pair = tl.load(scales + step).to(tl.int32)
        even, odd = (pair >> 4).to(tl.float32) * super_scale, (pair & 15).to(tl.float32) * super_scale
        scale = tl.where(j[:, None] < 16, round_bf16(even)[None, :], round_bf16(odd)[None, :])
        code = _codes(tl.load(bytes_ + 32 * step), code_scale[None, :], code_zero[None, :], INTERPRETED)
        for i in tl.static_range(4):
            # the window stays where it is, and the scale pays for it: both are exact
            power = 512 >> 3 * i
            value = (code & 63 * power | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + 32 * power)
            a = tl.load(inputs + 128 * step + 32 * i, mask=taken[:, None], other=0.0)
            weight = _bf16(value * (scale * (1.0 / power)), INTERPRETED)
            if INTERPRETED:  # noqa: SIM108 - one of two is compiled; the interpreter takes the bits of a bf16 for an integer
                total = tl.dot(a.to(tl.float32), weight.to(tl.float32), total)
            else:
                total = tl.dot(a, weight, total)
    at = out + choice.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, _bf16(total, INTERPRETED), mask=taken[:, None] & there[None, :])


@jit
def _gated(hidden, out, width, LANES: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = at < width
    # the input at a place of `planes`: 128 a + 64 second + 32 first + 16 group + 4 high + low
    place = at % 128
    wanted = at - place + place // 16 % 2 * 64 + place % 4 * 16 + place // 64 * 8 + place // 4 % 4 * 2 + place // 32 % 2
    gate = tl.load(hidden + row * 2 * width + wanted, mask=there, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * width + width + wanted, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, _bf16(gate / (1.0 + tl.exp(-gate)) * up, INTERPRETED), mask=there)


@jit
def _summed(  # type: ignore[no-untyped-def]
    out, topk_weights, topk_ids, total, hidden, TOP: tl.constexpr, LANES: tl.constexpr, INTERPRETED: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = at < hidden
    sum_ = tl.zeros((LANES,), tl.float32)
    for choice in range(0, TOP):
        place = token * TOP + choice
        if tl.load(topk_ids + place) >= 0:
            part = tl.load(out + place * hidden + at, mask=there, other=0.0).to(tl.float32)
            sum_ += part * tl.load(topk_weights + place)
    tl.store(total + token * hidden + at, _bf16(sum_, INTERPRETED), mask=there)
