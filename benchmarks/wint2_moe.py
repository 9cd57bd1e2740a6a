"""A layer's WINT2 experts on a GPU: are products right, and how many tokens a second, beside bf16 and int4 experts.

python benchmarks/wint2_moe.py --table wint2_moe.md     # on a machine with a GPU of compute capability 8.0 or more
python benchmarks/wint2_moe.py --tiny                   # a small layer on the CPU, in Triton's interpreter: tries this script

Of each geometry one layer of routed experts, as a rank of --tp GPUs has it: tokens take experts at random, and all forms get the
same. Weights are random bytes; their values do not change what an instruction takes. Times are of a CUDA graph of --repeat layers
with copies of the weights that do not fit a cache together, the median of ten. Beside WINT2:

bf16      vLLM's fused_experts, where it can be imported; else one F.linear per expert, without a graph
int4      vLLM's Marlin experts, where they can be imported; else decoded with torch and multiplied, without a graph

First the products are compared with weights that are decoded and multiplied in bf16; ends with code 1 where one
is off by more than the steps of bf16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from ernie_quant.serving import experts, experts_triton, grouping
from ernie_quant.serving.experts import Stored

TIMES = 10
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, weights of experts, ids


@dataclass(frozen=True)
class Geometry:
    """Of a layer's routed experts."""

    name: str
    hidden: int
    width: int
    count: int
    top: int

    def of_rank(self, ranks: int) -> Geometry:
        """A rank's share of the widths."""
        return Geometry(
            self.name + (f", TP {ranks}" if ranks > 1 else ""), self.hidden, self.width // ranks, self.count, self.top
        )

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """[experts, out, in] of gate and up, and of down."""
        return (self.count, 2 * self.width, self.hidden), (self.count, self.hidden, self.width)


TRUE = [Geometry("21B", 2560, 1536, 64, 6), Geometry("300B", 8192, 3584, 64, 8)]
TINY = [Geometry("tiny", 128, 128, 4, 2)]


def random_stored(shape: tuple[int, int, int], device: str) -> Stored:
    """Bytes, and scales that make weights of about 1 / sqrt(in)."""
    count, rows, width = shape
    packed = torch.randint(0, 256, (count, rows, width // 4), dtype=torch.uint8, device=device)
    local = torch.randint(0, 256, (count, rows, width // 128), dtype=torch.uint8, device=device)
    super_scale = torch.full((count, rows), 1 / (128 * width**0.5), device=device).bfloat16().float()
    code_scale, code_zero = torch.full_like(super_scale, 120.9609375), torch.full_like(super_scale, 1120.0)
    return Stored(packed, local, torch.stack([super_scale, code_scale, code_zero], 2))


# ---- forms ----------------------------------------------------------------------------------------------------------------


def wint2(geometry: Geometry, device: str) -> Layer:
    """Ours, with vLLM's grouping where it is to be had."""
    gate_up, down = (random_stored(shape, device) for shape in geometry.shapes)
    align = _align(geometry.count)
    return lambda x, weights, ids: experts_triton.products(x, gate_up, down, weights, ids, align)


def _align(count: int) -> experts_triton.Align:
    try:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    except ImportError:
        return lambda ids, block: grouping.aligned(ids, block, count)
    return lambda ids, block: moe_align_block_size(ids, block, count)


def bf16(geometry: Geometry, device: str) -> Layer:
    """Plain weights."""
    gate_up, down = (torch.randn(shape, dtype=torch.bfloat16, device=device) / shape[2] ** 0.5 for shape in geometry.shapes)
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError:
        return _one_by_one(lambda expert: (gate_up[expert], down[expert]))
    return lambda x, weights, ids: fused_experts(x, gate_up, down, weights, ids)


def int4(geometry: Geometry, device: str) -> Layer:
    """Codes in groups of 128."""
    try:
        return _marlin(geometry, device)
    except ImportError:
        pass
    codes = [torch.randint(0, 256, (*shape[:2], shape[2] // 2), dtype=torch.uint8, device=device) for shape in geometry.shapes]
    scales = [
        torch.full((*s[:2], s[2] // 128), 1 / (4 * s[2] ** 0.5), dtype=torch.bfloat16, device=device) for s in geometry.shapes
    ]

    def weight(which: int, expert: int) -> torch.Tensor:
        packed = codes[which][expert]
        values = (torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8).to(torch.bfloat16)
        return values * scales[which][expert].repeat_interleave(128, -1)

    return _one_by_one(lambda expert: (weight(0, expert), weight(1, expert)))


def _marlin(geometry: Geometry, device: str) -> Layer:
    """vLLM's; packed as Marlin wants it, whose order does not change what it takes."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    count = geometry.count
    packed = [
        torch.randint(-(2**31), 2**31 - 1, (count, width // 16, rows * 2), dtype=torch.int32, device=device)
        for _, rows, width in geometry.shapes
    ]
    scales = [
        torch.full((count, width // 128, rows), 1 / (4 * width**0.5), dtype=torch.bfloat16, device=device)
        for _, rows, width in geometry.shapes
    ]
    kind = scalar_types.uint4b8.id

    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = fused_marlin_moe(x, *packed, None, None, *scales, weights, ids, quant_type_id=kind)
        return found

    return layer


def _one_by_one(weights_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> Layer:
    """F.linear, expert by expert."""

    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert in ids.unique().tolist():
            gate_up, down = weights_of(expert)
            token, choice = (ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up).float().chunk(2, -1)
            out = F.linear((F.silu(gate) * up).to(x.dtype), down)
            total.index_add_(0, token, out.float() * weights[token, choice, None])
        return total.to(x.dtype)

    return layer


FORMS: dict[str, Callable[[Geometry, str], Layer]] = {"WINT2": wint2, "bf16": bf16, "int4": int4}


# ---- right ----------------------------------------------------------------------------------------------------------------


def off_by(geometry: Geometry, tokens: int, device: str) -> float:
    """The largest difference to decoded weights and F.linear, in steps of bf16 of a row's largest."""
    gate_up, down = (random_stored(shape, device) for shape in geometry.shapes)
    x, weights, ids = inputs(geometry, tokens, device)
    align = _align(geometry.count)
    found = experts_triton.products(x, gate_up, down, weights, ids, align).float()
    wanted = experts.products(x, gate_up, down, weights, ids).float()
    return float(((found - wanted).abs().amax(1) / wanted.abs().amax(1).clamp(min=1e-30)).max() * 256)


def inputs(geometry: Geometry, tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights of experts and their numbers; no token takes one twice."""
    random = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(geometry.count, generator=random)[: geometry.top] for _ in range(tokens)])
    x = torch.randn((tokens, geometry.hidden), generator=random).bfloat16()
    weights = torch.rand((tokens, geometry.top), generator=random)
    return x.to(device), weights.to(device), ids.to(torch.int32).to(device)


# ---- fast -----------------------------------------------------------------------------------------------------------------


def seconds(layers: list[Layer], given: tuple[torch.Tensor, ...], device: str) -> tuple[float, str]:
    """Of one layer, the median; and how it was launched."""

    def run() -> None:
        for layer in layers:
            layer(*given)

    run()
    how = "eager"
    if device == "cuda":
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run, how = graph.replay, "graph"
        except RuntimeError:  # a form that reads ids back
            torch.cuda.synchronize()
    taken = []
    for _ in range(TIMES if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) / len(layers), how


def cell(form: str, geometry: Geometry, tokens: int, repeat: int, device: str) -> str:
    """Tokens a second of one layer, or why there are none."""
    try:
        layers = [FORMS[form](geometry, device) for _ in range(repeat)]
        taken, how = seconds(layers, inputs(geometry, tokens, device), device)
        return f"{tokens / taken:,.0f} ({1e6 * taken:,.0f} µs, {how})"
    except Exception as error:  # whatever fails is a cell
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    """0 where products are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small layer on the CPU, in Triton's interpreter")
    parser.add_argument("--tokens", type=int, nargs="+", help="1, 8, 64 and 512 on a GPU, where the last takes the larger tile")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the widths of experts")
    parser.add_argument("--repeat", type=int, default=4, help="layers in a graph")
    parser.add_argument("--table", type=Path, help="write it to this file")
    wanted = parser.parse_args()
    device = "cpu" if wanted.tiny else "cuda"
    geometries = TINY if wanted.tiny else [geometry.of_rank(wanted.tp) for geometry in TRUE]
    name = "Triton's interpreter; times say nothing" if wanted.tiny else torch.cuda.get_device_name()
    rows = [f"{name}; PyTorch {torch.__version__}, Triton {experts_triton.triton.__version__}.", ""]
    rows += [f"| one layer | tokens | WINT2 off by, steps of bf16 | {' | '.join(f'{form}, tokens/s' for form in FORMS)} |"]
    rows += [f"|---|---|---|{'---|' * len(FORMS)}"]
    worst, counts = 0.0, wanted.tokens or ([1, 8, 64] if wanted.tiny else [1, 8, 64, 512])
    for geometry in geometries:
        for tokens in counts:
            off = off_by(geometry, tokens, device)
            worst = max(worst, off)
            cells = [cell(form, geometry, tokens, 1 if wanted.tiny else wanted.repeat, device) for form in FORMS]
            rows.append(f"| {geometry.name} | {tokens} | {off:.2f} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    table: Any = "\n".join([*rows, ""])
    print(f"\n{table}")
    if wanted.table:
        wanted.table.write_text(table)
    return int(not worst <= 2)


if __name__ == "__main__":
    sys.exit(main())
