"""How many GPUs can share a model, as heads, widths, groups and a runtime's kernels allow: the one place that says so.

q, k, v, gate and up are shared along their outputs, o and down along their inputs. Every rank has whole heads; where
there are more ranks than kv heads, several ranks have the same kv head (vllm-project/vllm, QKVParallelLinear;
PaddlePaddle/FastDeploy, QKVParallelLinear).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ernie_quant.names import EXPERT_ROLES, OUT
from ernie_quant.runtimes import Linear, Runtime, Spread
from ernie_quant.runtimes._values import EXPERTS, STAGES, TENSOR

TP_SIZES = range(1, 65)
KV = ("k_proj.weight", "v_proj.weight")


class _Width(NamedTuple):
    """What of a linear is shared: its size along that axis, of which a rank has a multiple of `multiple`."""

    size: int
    multiple: int
    kv: bool

    def fits(self, of: int, kv_heads: int) -> bool:
        """Can `of` ranks share it?"""
        return self.size % ((min(of, kv_heads) if self.kv else of) * self.multiple) == 0


def tp_sizes(runtime: Runtime, linears: Sequence[Linear], dims: Mapping[str, int], heads: int) -> tuple[int, ...]:
    """The sizes for which there are no problems."""
    widths = {width for linear in linears if (width := _width(runtime, linear))}  # few, however many linears
    return tuple(
        tp
        for tp in TP_SIZES
        if not any(_of_model(runtime, dims, heads, tp)) and all(width.fits(tp, dims["kv_heads"]) for width in widths)
    )


def spreads(
    runtime: Runtime, linears: Sequence[Linear], dims: Mapping[str, int], heads: int, *, layers: int, most: int
) -> list[Spread]:  # fmt: skip
    """Every way in which up to `most` GPUs share a model of so many layers: fewest first, then the plainest.

    Experts that stay whole are cut nowhere, so that their widths forbid nothing; a GPU has one of them at least.
    """
    whole = [Spread()]
    if TENSOR in runtime.PARALLEL:
        whole = [Spread(tp) for tp in tp_sizes(runtime, linears, dims, heads)]
    if EXPERTS in runtime.PARALLEL and "E" in dims and Spread() in whole:  # widths may forbid even a GPU alone
        others = [linear for linear in linears if linear.role not in EXPERT_ROLES]
        whole += [Spread(tp, 1, True) for tp in tp_sizes(runtime, others, dims, heads) if 1 < tp <= dims["E"]]
    stages = range(1, min(most, layers) + 1) if STAGES in runtime.PARALLEL else (1,)
    found = [replace(spread, stages=n) for spread in whole for n in stages if spread.tensor * n <= most]
    return sorted(found, key=lambda s: (s.gpus, s.stages, s.experts_whole))


def problems(runtime: Runtime, linears: Sequence[Linear], dims: Mapping[str, int], heads: int, of: int) -> Iterator[str]:
    """Why a model cannot be shared by `of` ranks, a line for each reason."""
    yield from _of_model(runtime, dims, heads, of)
    for linear in linears:
        width = _width(runtime, linear)
        if width and not width.fits(of, dims["kv_heads"]):
            kind = "outputs" if linear.ranks == OUT else "inputs"
            would = ", ".join(str(n) for n in TP_SIZES if width.fits(n, dims["kv_heads"])) or "no number"
            yield (
                f"{linear.name}: {width.size} {kind} in multiples of {width.multiple} cannot be shared by {of} ranks;"
                f" {would} would do"
            )


def _of_model(runtime: Runtime, dims: Mapping[str, int], heads: int, of: int) -> Iterator[str]:
    """What forbids a size whatever the linears are."""
    kv_heads = dims["kv_heads"]
    if heads % of or (kv_heads % of and of % kv_heads):
        yield f"attention: {heads} heads and {kv_heads} kv heads cannot be shared by {of} ranks"
    if runtime.SPLITS_VOCABULARY and dims["V"] % of:
        yield f"embeddings: {dims['V']} tokens cannot be shared by {of} ranks"


def _width(runtime: Runtime, linear: Linear) -> _Width | None:
    """None for a linear that every rank has whole, and where heads decide."""
    if linear.ranks is None or not (multiple := runtime.share_multiple(linear)):
        return None
    return _Width(linear.spec.shape[linear.ranks], multiple, linear.name.endswith(KV))
