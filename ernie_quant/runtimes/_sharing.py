"""Which tensor-parallel sizes heads, widths, groups and a runtime's kernels allow: the one place that says so.

q, k, v, gate and up are shared along their outputs, o and down along their inputs. Every rank has whole heads; where
there are more ranks than kv heads, several ranks have the same kv head (vllm-project/vllm, QKVParallelLinear;
PaddlePaddle/FastDeploy, QKVParallelLinear).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ernie_quant.names import OUT
from ernie_quant.runtimes import Linear, Runtime

TP_SIZES = (1, 2, 4, 8, 16, 32, 64)
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
    """The sizes, powers of two, for which there are no problems."""
    widths = {width for linear in linears if (width := _width(runtime, linear))}  # few, however many linears
    return tuple(
        tp
        for tp in TP_SIZES
        if not any(_of_model(runtime, dims, heads, tp)) and all(width.fits(tp, dims["kv_heads"]) for width in widths)
    )


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
